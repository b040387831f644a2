"""`rayllm chat`: a conversation in the terminal."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from rayllm.cli.console import note, print_json, stdout_kept_clean
from rayllm.cli.options import MODEL_HELP, EngineOptions, Json, SamplingOptions, expand
from rayllm.core.errors import RayLLMError

if TYPE_CHECKING:  # brings httpx
    from rayllm.cli.chat_backend import ChatBackend, Messages

EXAMPLES = """
Example: `rayllm chat smollm2-135m`

Example: `rayllm chat --url grpc://localhost:9000`
"""
HELP = "/exit or Ctrl-D leaves, Ctrl-C stops an answer, /reset forgets the conversation."


@expand
def chat(
    engine: EngineOptions,
    sampling: SamplingOptions,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=f"To run here. {MODEL_HELP}")] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Talk to a running server instead: http://localhost:8000 or grpc://localhost:9000."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="Instructions for the model.")] = None,
    as_json: Json = False,
) -> None:
    """Talk with a model: one on a running server (--url), or one loaded into this process (MODEL).

    The conversation is kept and sent with every question. /exit or Ctrl-D leaves, Ctrl-C stops an answer, /reset
    forgets the conversation. With --json, the questions are the lines of stdin and the whole conversation is
    printed at the end.
    """
    if (model is None) == (url is None):
        raise typer.BadParameter("give either MODEL or --url")
    if url is not None:
        engine.refuse_with_url()
    with stdout_kept_clean():
        from rayllm.cli.chat_backend import LocalBackend, connect

        backend = connect(url, sampling) if url is not None else LocalBackend(engine.config(model), sampling)
    messages = [] if system is None else [{"role": "system", "content": system}]
    with contextlib.closing(backend):
        converse(backend, messages, out=sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json({"model": backend.name, "messages": messages})


def converse(backend: "ChatBackend", messages: "Messages", *, out: TextIO) -> None:
    """Questions from stdin until it ends; `messages` grows by each question and its answer, cut short or not."""
    interactive = sys.stdin.isatty()
    start = list(messages)
    if interactive:
        note(f"Talking with {backend.name}. {HELP}")
    while (question := _read_question(interactive, out)) not in (None, "/exit"):
        if question == "/reset":
            messages[:] = start
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                messages.append({"role": "assistant", "content": _print_answer(backend, messages, out)})
            except RayLLMError as error:
                if not interactive:
                    raise
                note(f"error: {error}")
                del messages[-1]


def _read_question(interactive: bool, out: TextIO) -> str | None:
    """One line; None at the end of stdin."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    with contextlib.redirect_stdout(out):  # where input() writes its prompt
        try:
            return input("\n> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            return ""


def _print_answer(backend: "ChatBackend", messages: "Messages", out: TextIO) -> str:
    """What was said, up to the end or to Ctrl-C."""
    text = ""
    pieces = backend.answer(messages)
    with contextlib.closing(pieces), contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            text += piece
            print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)
    return text
