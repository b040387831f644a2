"""From deltas to OpenAI's response objects, whole or as server-sent events.

One small encode for each streamed piece: what all the pieces of a response have in common is encoded once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import TokenLogprobs
from rayllm.engine.outputs import OutputDelta
from rayllm.serve.openai_logprobs import chat_logprobs, completion_logprobs
from rayllm.serve.service import Generation, Usage

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


@dataclass(kw_only=True, slots=True)
class Choice:
    """What came of one choice and was not sent yet."""

    index: int
    prompt_token_ids: Sequence[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    started: bool = False  # something was sent
    text_offset: int = 0  # where the next token's text begins

    def take(self, delta: OutputDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value
            self.stop_reason = delta.stop_reason

    def sent(self) -> None:
        self.text = ""
        self.token_ids = []
        self.logprobs = []
        self.prompt_logprobs = None
        self.started = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What is particular to a route: how a choice looks, whole and as a piece of a stream."""

    object_name: str
    chunk_object_name: str
    whole: Callable[[Choice], dict[str, Any]]
    piece: Callable[[Choice], dict[str, Any]]


class ResponseWriter:
    """The choices of one response; choice = prompt * n + sequence, as OpenAI counts them."""

    def __init__(
        self,
        generation: Generation,
        layout: Layout,
        *,
        include_usage: bool,
        every_token: bool,
        echo: Sequence[str] | None = None,
    ) -> None:
        """`every_token`: send a piece for each token, even while its text is held back. `echo`: what each prompt's
        answers begin with."""
        self._generation = generation
        self._layout = layout
        self._n = generation.call.params.n
        self._every_token = every_token
        self._include_usage = include_usage
        self._choices = [
            Choice(
                index=prompt * self._n + i,
                prompt_token_ids=request.prompt_token_ids,
                text="" if echo is None else echo[prompt],
            )
            for prompt, request in enumerate(generation.requests)
            for i in range(self._n)
        ]
        self._chunk_tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    @cached_property
    def _common(self) -> dict[str, Any]:
        """Once the answer has begun: before, it is not known by which weights."""
        return {
            "id": self._generation.request_id,
            "created": self._generation.created,
            "model": self._generation.call.model,
            "system_fingerprint": self._generation.weight_version,
        }

    @cached_property
    def _chunk_head(self) -> bytes:
        return b"data: " + _encode(self._common | {"object": self._layout.chunk_object_name})[:-1] + b',"choices":['

    def take(self, prompt: int, delta: OutputDelta) -> Choice:
        choice = self._choices[prompt * self._n + delta.index]
        choice.take(delta)
        return choice

    def chunk(self, prompt: int, delta: OutputDelta) -> bytes | None:
        """The event for a delta; None while it holds nothing that a reader could see."""
        choice = self.take(prompt, delta)
        if not (choice.text or choice.finish_reason or not choice.started or self._every_token):
            return None
        body = _encode(self._layout.piece(choice))
        choice.sent()
        return self._chunk_head + body + self._chunk_tail

    def end(self) -> bytes:
        """The last events of a stream."""
        if not self._include_usage:
            return DONE
        return self._chunk_head + b'],"usage":' + _encode(self._usage()) + b"}\n\n" + DONE

    def response(self) -> bytes:
        choices = [self._layout.whole(choice) for choice in self._choices]
        return _encode(self._common | {"object": self._layout.object_name, "choices": choices, "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        usage: Usage = self._generation.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceOptions:
    logprobs: bool
    token_ids: bool
    prompt_logprobs: bool
    echo: bool = False


def completion_layout(tokenizer: Tokenizer, options: ChoiceOptions) -> Layout:
    def choice_object(choice: Choice) -> dict[str, Any]:
        logprobs = None
        if options.logprobs:
            ids: Sequence[int] = choice.token_ids
            positions: list[TokenLogprobs | None] = [*choice.logprobs]
            if options.echo and choice.prompt_logprobs is not None:
                ids = [*choice.prompt_token_ids, *ids]
                positions = [*choice.prompt_logprobs, *positions]
            logprobs, choice.text_offset = completion_logprobs(
                tokenizer, ids, positions, text_offset=choice.text_offset
            )
        return {"text": choice.text, "logprobs": logprobs, **_common_fields(choice, options)}

    return Layout(
        object_name="text_completion",
        chunk_object_name="text_completion",
        whole=choice_object,
        piece=choice_object,
    )


def chat_layout(tokenizer: Tokenizer, options: ChoiceOptions) -> Layout:
    def choice_object(choice: Choice, key: str, message: dict[str, Any]) -> dict[str, Any]:
        logprobs = chat_logprobs(tokenizer, choice.logprobs) if options.logprobs else None
        return {key: message, "logprobs": logprobs, **_common_fields(choice, options)}

    def whole(choice: Choice) -> dict[str, Any]:
        return choice_object(choice, "message", {"role": "assistant", "content": choice.text, "refusal": None})

    def piece(choice: Choice) -> dict[str, Any]:
        delta = {"content": choice.text} if choice.started else {"role": "assistant", "content": choice.text}
        return choice_object(choice, "delta", delta)

    return Layout(
        object_name="chat.completion",
        chunk_object_name="chat.completion.chunk",
        whole=whole,
        piece=piece,
    )


def _common_fields(choice: Choice, options: ChoiceOptions) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "index": choice.index,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if options.token_ids:
        fields["token_ids"] = choice.token_ids
        if not choice.started:
            fields["prompt_token_ids"] = choice.prompt_token_ids
    if options.prompt_logprobs and choice.prompt_logprobs is not None:
        fields["prompt_logprobs"] = choice.prompt_logprobs
    return fields
