"""Between protobuf messages and the engine's own types. Knows nothing of calls, statuses or Serve."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import FinishReason, SamplingParams, TokenLogprobs
from rayllm.engine.outputs import OutputDelta
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.serve.prompts import Chat, Prompt
from rayllm.serve.service import (
    DEFAULT_MAX_TOKENS,
    GenerateCall,
    Generation,
    Resumption,
    Usage,
    checked_session,
    new_request_id,
)

_Message = TypeVar("_Message", bound=Message)

_OPTIONAL_PARAMS = (
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "prompt_logprobs_start",
)

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def parse(kind: type[_Message], data: bytes) -> _Message:
    """Raises InvalidRequestError for bytes that are no such message, and for a field that it does not have: what this
    server does not know it must not ignore."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise InvalidRequestError("message", f"is not a valid {kind.DESCRIPTOR.full_name}") from None
    _refuse_unknown_fields(message)
    return message


def generate_call(request: pb.GenerateRequest) -> GenerateCall:
    kind = request.WhichOneof("prompt")
    prompt: Prompt
    if kind == "text":
        prompt = request.text
    elif kind == "token_ids":
        prompt = list(request.token_ids.ids)
    elif kind == "chat":
        prompt = chat(request.chat)
    else:
        raise InvalidRequestError("prompt", "is missing: give text, token_ids or chat")
    if request.attempt < 0:
        raise InvalidRequestError("attempt", f"{request.attempt} is negative")
    return GenerateCall(
        face="grpc",
        model=request.model,
        prompts=(prompt,),
        params=_sampling_params(request.sampling, is_chat=kind == "chat"),
        request_id=request.request_id or new_request_id("grpc"),
        timeout_ms=request.timeout_ms if request.HasField("timeout_ms") else None,
        attempt=request.attempt,
        resume=_resumption(request.resume) if request.HasField("resume") else None,
        session=checked_session("session_id", request.session_id) if request.session_id else None,
    )


def _resumption(message: pb.Resumption) -> Resumption:
    if not message.sequences:
        raise InvalidRequestError("resume", "has no sequences")
    return Resumption(
        weight_version=message.weight_version,
        token_ids=tuple(None if each.finished else tuple(each.token_ids) for each in message.sequences),
        num_tokens=sum(len(each.token_ids) for each in message.sequences),
    )


def chat(message: pb.Chat) -> Chat:
    return Chat(tuple({"role": each.role, "content": each.content} for each in message.messages))


def chunk(generation: Generation, delta: OutputDelta) -> pb.GenerateChunk:
    message = pb.GenerateChunk(
        request_id=generation.request_id,
        weight_version=generation.weight_version,
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=_FINISH_REASONS[delta.finish_reason],
    )
    if delta.logprobs is not None:
        message.logprobs.extend(map(_logprobs, delta.logprobs))
    if delta.prompt_logprobs is not None:
        message.prompt_logprobs.extend(_prompt_logprobs(delta.prompt_logprobs))
    _set_stop_reason(message, delta.stop_reason)
    return message


class ResponseBuilder:
    """The whole answer to a unary call, delta by delta."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._message = pb.GenerateResponse(
            request_id=generation.request_id,
            model=generation.call.model,
            outputs=[pb.Completion(index=index) for index in range(generation.call.params.n)],
        )

    def take(self, delta: OutputDelta) -> None:
        output = self._message.outputs[delta.index]
        output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            output.logprobs.extend(map(_logprobs, delta.logprobs))
        if delta.prompt_logprobs is not None:
            self._message.prompt_logprobs.extend(_prompt_logprobs(delta.prompt_logprobs))
        output.finish_reason = _FINISH_REASONS[delta.finish_reason]
        _set_stop_reason(output, delta.stop_reason)

    def build(self) -> pb.GenerateResponse:
        self._message.weight_version = self._generation.weight_version
        self._message.usage.CopyFrom(usage(self._generation.usage))
        return self._message


def usage(counts: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        cached_tokens=counts.cached_tokens,
    )


def _sampling_params(message: pb.SamplingParams, *, is_chat: bool) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": None if is_chat else DEFAULT_MAX_TOKENS}
    given |= {name: getattr(message, name) for name in _OPTIONAL_PARAMS if message.HasField(name)}
    return SamplingParams(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logprob_token_ids=tuple(message.logprob_token_ids),
        logit_bias=dict(message.logit_bias),
    )


def _logprobs(position: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=position.token_id,
        logprob=position.logprob,
        rank=position.rank,
        top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in position.top],
    )


def _prompt_logprobs(positions: Sequence[TokenLogprobs | None]) -> Iterable[pb.TokenLogprobs]:
    """The first tokens have none, as many as the request says: one, which nothing precedes, or more."""
    return (_logprobs(position) for position in positions if position is not None)


def _set_stop_reason(message: pb.GenerateChunk | pb.Completion, stop_reason: str | int | None) -> None:
    if isinstance(stop_reason, str):
        message.stop_string = stop_reason
    elif stop_reason is not None:
        message.stop_token_id = stop_reason


def _refuse_unknown_fields(message: Message, path: str = "") -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        where = path or message.DESCRIPTOR.name
        raise InvalidRequestError(where, f"field number {unknown[0].field_number} is not known to this server")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        name = f"{path}.{descriptor.name}" if path else descriptor.name
        if isinstance(value, Message):
            _refuse_unknown_fields(value, name)
        else:
            for i, each in enumerate(value):
                _refuse_unknown_fields(each, f"{name}[{i}]")
