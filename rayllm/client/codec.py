"""Between Python values and the messages of `rayllm.v1`; does no I/O.

What cannot be put into a message is refused here, with the error that the server would send.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import cast

from rayllm.client.types import Chunk, Generation, Load, ModelInfo, Prompt, Usage
from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import FinishReason, SamplingParams, TokenLogprobs, check_utf8
from rayllm.engine.outputs import CompletionOutput
from rayllm.proto.v1 import inference_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_MAX_TOKEN_ID = (1 << 31) - 1
MAX_TIMEOUT_S = 1e9


def generate_request(
    prompt: Prompt,
    params: SamplingParams | None,
    *,
    model: str,
    request_id: str,
    timeout_s: float | None,
    session_id: str = "",
) -> pb.GenerateRequest:
    """`params` None leaves every choice to the server. Raises InvalidRequestError."""
    request = pb.GenerateRequest(model=_text("model", model), request_id=_text("request_id", request_id))
    request.session_id = _text("session_id", session_id)
    if isinstance(prompt, str):
        request.text = _text("prompt", prompt)
    elif is_chat(prompt):
        request.chat.CopyFrom(_chat(cast("Sequence[Mapping[str, str]]", prompt)))
    else:
        request.token_ids.ids.extend(_token_ids("prompt", prompt))
        request.token_ids.SetInParent()
    if params is not None:
        request.sampling.CopyFrom(_sampling(params, is_chat=request.HasField("chat")))
    if timeout_s is not None:
        if not 0 <= timeout_s <= MAX_TIMEOUT_S:
            raise InvalidRequestError("timeout_s", f"{timeout_s} is not in [0, {MAX_TIMEOUT_S:g}]")
        request.timeout_ms = milliseconds(timeout_s)
    return request


def milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def tokenize_request(prompt: Prompt, *, model: str, add_special_tokens: bool) -> pb.TokenizeRequest:
    request = pb.TokenizeRequest(model=_text("model", model))
    if isinstance(prompt, str):
        request.text = _text("prompt", prompt)
        request.add_special_tokens = add_special_tokens
    elif is_chat(prompt):
        request.chat.CopyFrom(_chat(cast("Sequence[Mapping[str, str]]", prompt)))
    else:
        raise InvalidRequestError("prompt", "must be text or the messages of a conversation")
    return request


def detokenize_request(token_ids: Sequence[int], *, model: str) -> pb.DetokenizeRequest:
    return pb.DetokenizeRequest(model=_text("model", model), token_ids=_token_ids("token_ids", token_ids))


def is_chat(prompt: Prompt) -> bool:
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return is_list and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _chat(messages: Sequence[Mapping[str, str]]) -> pb.Chat:
    chat = pb.Chat()
    for message in messages:
        if set(message) != {"role", "content"}:
            raise InvalidRequestError("messages", "each must have `role` and `content`, and nothing else")
        chat.messages.add(role=_text("messages", message["role"]), content=_text("messages", message["content"]))
    return chat


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(field, f"must be text, not {type(value).__name__}")
    check_utf8(field, value)
    return value


def _token_ids(field: str, token_ids: object) -> list[int]:
    if not isinstance(token_ids, Iterable) or isinstance(token_ids, bytes | bytearray):
        raise InvalidRequestError(field, f"must be token ids, not {type(token_ids).__name__}")
    checked: list[int] = []
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= _MAX_TOKEN_ID:
            raise InvalidRequestError(field, f"{token_id!r} is not a token id")
        checked.append(token_id)
    return checked


def _sampling(params: SamplingParams, *, is_chat: bool) -> pb.SamplingParams:
    if params.max_tokens is None and not is_chat:
        # An absent max_tokens is 16 for a text, and the length of the context is not known here.
        raise InvalidRequestError("max_tokens", "must be given for a prompt that is not a conversation")
    message = pb.SamplingParams()
    for field in fields(params):
        value = getattr(params, field.name)
        if isinstance(value, Mapping):
            message.logit_bias.update(value)
        elif isinstance(value, tuple):
            getattr(message, field.name).extend(_text(field.name, v) if isinstance(v, str) else v for v in value)
        elif value is not None:
            setattr(message, field.name, value)
    return message


def generation(message: pb.GenerateResponse, params: SamplingParams | None) -> Generation:
    """`params` are those of the request: an empty list of log-probabilities is not the same as none asked for."""
    with_logprobs = params is not None and params.logprobs is not None
    with_prompt_logprobs = params is not None and params.prompt_logprobs is not None
    return Generation(
        request_id=message.request_id,
        model=message.model,
        weight_version=message.weight_version,
        outputs=[
            CompletionOutput(
                index=output.index,
                text=output.text,
                token_ids=list(output.token_ids),
                logprobs=_logprobs(output.logprobs) if with_logprobs else None,
                finish_reason=_FINISH_REASONS[output.finish_reason],
                stop_reason=_stop_reason(output),
            )
            for output in message.outputs
        ],
        usage=_usage(message.usage),
        prompt_logprobs=_prompt_logprobs(message.prompt_logprobs, params) if with_prompt_logprobs else None,
    )


def chunk(message: pb.GenerateChunk, params: SamplingParams | None) -> Chunk:
    return Chunk(
        request_id=message.request_id,
        weight_version=message.weight_version,
        index=message.index,
        text=message.text,
        token_ids=list(message.token_ids),
        logprobs=_logprobs(message.logprobs) or None,
        finish_reason=_FINISH_REASONS[message.finish_reason],
        stop_reason=_stop_reason(message),
        prompt_logprobs=_prompt_logprobs(message.prompt_logprobs, params) if message.prompt_logprobs else None,
        usage=_usage(message.usage) if message.HasField("usage") else None,
    )


def model_info(message: pb.ModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        model=message.model,
        weight_version=message.weight_version,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
        eos_token_id=message.eos_token_id if message.HasField("eos_token_id") else None,
    )


def load(message: pb.LoadResponse) -> Load:
    return Load(**{field.name: getattr(message, field.name) for field in fields(Load)})


def _usage(message: pb.Usage) -> Usage:
    return Usage(prompt=message.prompt_tokens, completion=message.completion_tokens, cached=message.cached_tokens)


def _stop_reason(message: pb.Completion | pb.GenerateChunk) -> str | int | None:
    match message.WhichOneof("stop_reason"):
        case "stop_string":
            return message.stop_string
        case "stop_token_id":
            return message.stop_token_id
        case _:
            return None


def _prompt_logprobs(messages: Iterable[pb.TokenLogprobs], params: SamplingParams | None) -> list[TokenLogprobs | None]:
    """One entry for each prompt token: the message leaves out the first ones, which have none."""
    start = 1 if params is None else params.prompt_logprobs_start
    return [*[None] * start, *_logprobs(messages)]


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(
            token_id=message.token_id,
            logprob=message.logprob,
            rank=message.rank,
            top=tuple((entry.token_id, entry.logprob) for entry in message.top),
        )
        for message in messages
    ]
