"""`rayllm chat`: the conversation it keeps, with a scripted backend, and the backend that runs a model here."""

import io
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from rayllm.cli.chat import converse
from rayllm.cli.chat_backend import LocalBackend, Messages
from rayllm.cli.options import EngineOptions, SamplingOptions
from rayllm.core.errors import CapacityError, RayLLMError


class Scripted:
    name = "scripted"

    def __init__(self, *answers: list[str | BaseException]) -> None:
        self.answers = iter(answers)
        self.asked: list[Messages] = []
        self.closed = 0

    def answer(self, messages: Messages) -> Generator[str]:
        self.asked.append([dict(message) for message in messages])
        try:
            for piece in next(self.answers):
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.closed += 1

    def close(self) -> None:
        pass


class Terminal(io.StringIO):
    """stdin of somebody who sits there."""

    def isatty(self) -> bool:
        return True


def talk(monkeypatch, backend: Scripted, stdin: io.StringIO, start: Messages = ()) -> tuple[Messages, str]:
    monkeypatch.setattr(sys, "stdin", stdin)
    messages, out = list(start), io.StringIO()
    converse(backend, messages, out=out)
    return messages, out.getvalue()


def said(*texts: str) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_the_conversation_is_kept(monkeypatch):
    backend = Scripted(["He", "llo"], ["42"])
    messages, out = talk(monkeypatch, backend, io.StringIO("Hi\n\nWhat is it?\n/exit\nnever asked\n"))
    assert messages == said("Hi", "Hello", "What is it?", "42")
    assert backend.asked == [said("Hi"), said("Hi", "Hello", "What is it?")]
    assert out == "Hello\n42\n"


def test_reset_keeps_the_instructions(monkeypatch):
    backend = Scripted(["a"], ["b"])
    start = [{"role": "system", "content": "Be brief."}]
    messages, _ = talk(monkeypatch, backend, io.StringIO("one\n/reset\ntwo\n"), start)
    assert messages == start + said("two", "b")


def test_interrupt_stops_the_answer_and_keeps_what_was_said(monkeypatch):
    backend = Scripted(["Once ", "upon", KeyboardInterrupt()], ["b"])
    messages, out = talk(monkeypatch, backend, io.StringIO("tell\nthanks\n"))
    assert messages == said("tell", "Once upon", "thanks", "b")
    assert out == "Once upon\nb\n"
    assert backend.closed == 2


def test_an_error_ends_a_script_but_not_a_conversation(monkeypatch, capsys):
    full = CapacityError("the queue is full", retry_after_s=1.0)
    with pytest.raises(RayLLMError, match="the queue is full"):
        talk(monkeypatch, Scripted([full]), io.StringIO("Hi\n"))
    messages, _ = talk(monkeypatch, Scripted([full], ["b"]), Terminal("Hi\nagain\n"))
    assert messages == said("again", "b")
    assert "error: the queue is full" in capsys.readouterr().err


def test_a_model_in_this_process(tiny_model: Path):
    options = SamplingOptions(temperature=0, max_tokens=6)
    with closing(LocalBackend(EngineOptions().config(str(tiny_model)), options)) as backend:
        whole = "".join(backend.answer(said("the end")))
        assert "".join(backend.answer(said("the end"))) == whole
        answer = backend.answer(said("the end"))
        next(answer)
        answer.close()  # Ctrl-C
        assert backend._engine.stats().running == 0
        assert backend._engine.stats().waiting == 0
        backend._engine.check_integrity()
