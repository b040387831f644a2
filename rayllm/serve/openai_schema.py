"""What the OpenAI-compatible routes accept. Honour or reject, never ignore.

A field of OpenAI's that this server does not offer is known by name: it may be null or hold the value that asks for
nothing, anything else is refused. A field that nobody knows is refused as well. Bounds of sampling parameters are not
repeated here; `SamplingParams` checks them for every face.
"""

import json
import re
from typing import Any, Literal, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import SamplingParams
from rayllm.serve.prompts import Chat
from rayllm.serve.service import DEFAULT_MAX_TOKENS, GenerateCall, checked_session, new_request_id

_Model = TypeVar("_Model", bound=BaseModel)

# Each with the values that ask for nothing; null always does.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "user": (),
    "audio": (),
    "functions": ([],),
    "function_call": ("none",),
    "logit_processors": (),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

# pydantic names the members of a union in an error's location; these are all that the schemas below have.
_UNION = {
    "str": "a string",
    "list[str]": "a list of strings",
    "list[int]": "a list of token ids",
    "list[list[int]]": "a list of lists of token ids",
    "list[TextPart]": "a list of text parts",
}


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Sampling(Wire):
    """Shared by both routes. The second half are the engine's own parameters, beyond OpenAI's."""

    model: str
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int | None = None
    logprob_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    request_id: str | None = None
    timeout_ms: int | None = None

    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in _NOT_OFFERED and name not in cls.model_fields:
                if value is None or any(type(value) is type(each) and value == each for each in _NOT_OFFERED[name]):
                    continue
                raise InvalidRequestError(name, "is not supported by this server")
            kept[name] = value
        return kept

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "needs stream to be true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def session(self) -> str | None:
        key = self.prompt_cache_key
        return None if key is None else checked_session("prompt_cache_key", key)

    def _params(self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        given = {
            name: value
            for name in (
                "n",
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "frequency_penalty",
                "presence_penalty",
                "repetition_penalty",
                "seed",
                "min_tokens",
                "ignore_eos",
                "prompt_logprobs_start",
            )
            if (value := getattr(self, name)) is not None
        }
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprob_token_ids=tuple(self.logprob_token_ids or ()),
            logit_bias=_logit_bias(self.logit_bias or {}),
        )


class CompletionRequest(_Sampling):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None

    def call(self) -> GenerateCall:
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            if (self.n or 1) > 1:
                raise InvalidRequestError("n", "must be 1 when echo asks for the prompt's logprobs")
            if prompt_logprobs not in (None, self.logprobs):
                raise InvalidRequestError("prompt_logprobs", "must equal logprobs when echo asks for both")
            prompt_logprobs = self.logprobs
        return GenerateCall(
            face="http",
            model=self.model,
            prompts=_prompts(self.prompt),
            params=self._params(
                max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
                logprobs=self.logprobs,
                prompt_logprobs=prompt_logprobs,
            ),
            request_id=new_request_id("cmpl") if self.request_id is None else self.request_id,
            timeout_ms=self.timeout_ms,
            session=self.session,
        )


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    refusal: None = None
    name: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None

    @property
    def template_fields(self) -> dict[str, str]:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class ChatCompletionRequest(_Sampling):
    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None

    def call(self) -> GenerateCall:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs", "needs logprobs to be true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError("max_completion_tokens", "differs from max_tokens, its older name")
        renamed = {"logprobs": "top_logprobs"}
        if self.max_tokens is None:
            renamed["max_tokens"] = "max_completion_tokens"
        try:
            params = self._params(
                max_tokens=limits.pop() if limits else None,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                prompt_logprobs=self.prompt_logprobs,
            )
        except InvalidRequestError as error:
            raise InvalidRequestError(renamed.get(error.field, error.field), error.problem) from None
        messages = tuple(message.template_fields for message in self.messages)
        return GenerateCall(
            face="http",
            model=self.model,
            prompts=(Chat(messages),),
            params=params,
            request_id=new_request_id("chatcmpl") if self.request_id is None else self.request_id,
            timeout_ms=self.timeout_ms,
            session=self.session,
        )


class TokenizeRequest(Wire):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: list[int]


def parse(schema: type[_Model], body: bytes) -> _Model:
    """Raises InvalidRequestError naming the first field at fault."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, json.JSONDecodeError) else "cannot be read"
        raise InvalidRequestError("body", f"is not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("body", "must be a JSON object")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        _refuse(error)
    except RecursionError:
        raise InvalidRequestError("body", "is nested too deeply") from None


def _refuse(error: ValidationError) -> NoReturn:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    first = details[0]
    depth = next((i for i, part in enumerate(first["loc"]) if part in _UNION), None)
    if depth is not None:
        # Every member of the union has its own complaint; say what the members are.
        loc = first["loc"][:depth]
        members = {_UNION[str(d["loc"][depth])]: None for d in details if d["loc"][:depth] == loc}
        raise InvalidRequestError(_field_name(loc), f"must be {' or '.join(members)}") from None
    field = _field_name(first["loc"])
    if first["type"] == "extra_forbidden":
        raise InvalidRequestError(field, "is not a field of this request") from None
    message = first["msg"]
    raise InvalidRequestError(field, message[:1].lower() + message[1:]) from None


def _field_name(loc: tuple[int | str, ...]) -> str:
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            name += f".{part}" if name else part
    return name or "body"


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[str | list[int], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise InvalidRequestError("prompt", "is empty")
    if isinstance(prompt[0], int):
        return (prompt,)
    return tuple(prompt)


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    for token_id in bias:
        if not re.fullmatch(r"[0-9]{1,10}", token_id):
            raise InvalidRequestError("logit_bias", "keys must be token ids")
    return {int(token_id): value for token_id, value in bias.items()}
