"""A request and what comes back for it: plain data, the same behind Python, HTTP and gRPC."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rayllm.core.errors import InvalidRequestError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROB_TOKEN_IDS = 1024
MAX_TOKENS = 1 << 24
MAX_SEED = (1 << 63) - 1


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context is used up
    ERROR = "error"  # the model gave no distribution to choose from (NaN, or nothing possible)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose each next token, and when to stop.

    The order in which the sampler applies them: logit_bias, min_tokens, repetition penalty (Keskar et al. 2019,
    over prompt and output), frequency and presence penalty (OpenAI's, over the output), temperature,
    top-k, top-p, min-p. `temperature=0` is greedy. Every bound is checked at construction, so that an
    instance is always valid on its own; `InvalidRequestError` names the field. Bounds that depend on a model
    (context length, vocabulary) are checked where the model is known, `rayllm.core.limits`.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: drawn at random for each request
    max_tokens: int | None = 16  # None: up to the context's end
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives for each output token; 0: only the token chosen
    logprob_token_ids: tuple[int, ...] = ()  # alternatives that are wanted however unlikely; after the likely ones
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1  # the first prompt token to have one; those before may come from the prefix cache

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _bounded_tuple("stop", stop, MAX_STOP_STRINGS))
        stop_token_ids = _bounded_tuple("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        logprob_token_ids = _bounded_tuple("logprob_token_ids", self.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS)
        object.__setattr__(self, "logprob_token_ids", logprob_token_ids)
        _check_int("n", self.n, 1, MAX_N)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 1 << 31)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens or MAX_TOKENS)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _check_int(name, value, 0, MAX_LOGPROBS)
        _check_int("prompt_logprobs_start", self.prompt_logprobs_start, 1, MAX_TOKENS)
        if self.prompt_logprobs is None and self.prompt_logprobs_start > 1:
            raise InvalidRequestError("prompt_logprobs_start", "needs prompt_logprobs")
        if self.logprobs is None and self.logprob_token_ids:
            raise InvalidRequestError("logprob_token_ids", "needs logprobs")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError("ignore_eos", f"must be true or false, not {type(self.ignore_eos).__name__}")
        self._check_collections()

    def _check_collections(self) -> None:
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError("stop", "must hold strings that are not empty")
            if len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequestError("stop", f"a string is longer than {MAX_STOP_STRING_CHARS} characters")
            check_utf8("stop", text)
        for name, token_ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logprob_token_ids", self.logprob_token_ids),
        ):
            for token_id in token_ids:
                _check_int(name, token_id, 0, (1 << 31) - 1)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError(
                "logit_bias", f"must map token ids to numbers, not be a {type(self.logit_bias).__name__}"
            )
        _check_count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, (1 << 31) - 1)
            _check_float("logit_bias", bias, -100.0, 100.0)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # valid for good: the caller's may change


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt as token ids. `deadline` is in `time.monotonic()` seconds; None: no deadline.

    `weight_version`: the weights that are to answer; None: those that answer new requests when this one arrives.

    `resume`, if not empty, has for each of the n sequences the tokens that it was given elsewhere, to be gone on from;
    None: it is finished. What comes back for the request is what follows on them.

    `session`: requests that share it are best answered by the same replica; to one engine it says nothing.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    deadline: float | None = None
    weight_version: str | None = None
    resume: tuple[tuple[int, ...] | None, ...] = ()
    session: str | None = None

    @property
    def started(self) -> dict[int, tuple[int, ...]]:
        """The sequences that are to be generated, by index, each with the tokens that it has already."""
        resume = self.resume or ((),) * self.params.n
        return {index: token_ids for index, token_ids in enumerate(resume) if token_ids is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution (before penalties and temperature).

    `top` holds the most likely (token_id, logprob), best first, then those of `logprob_token_ids`, as many and in that
    order; the token itself is not added to it. `rank` is the token's place in the vocabulary by probability, 1 the
    most likely.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


def _bounded_tuple(name: str, value: object, max_len: int) -> tuple[Any, ...]:
    if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
        raise InvalidRequestError(name, f"must be a list, not {type(value).__name__}")
    _check_count(name, len(value), max_len)
    return tuple(value)


def _check_count(name: str, count: int, max_count: int) -> None:
    if count > max_count:
        raise InvalidRequestError(name, f"{count} entries, at most {max_count} are allowed")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(name, f"must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        raise InvalidRequestError(name, f"{short_int(value)} is not in [{low}, {high}]")


def _check_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(name, f"must be a number, not {type(value).__name__}")
    if isinstance(value, int) and abs(value) > 1 << 53:
        raise InvalidRequestError(name, f"{short_int(value)} is out of range")
    if not math.isfinite(value) or not low <= value <= high or (low_open and value == low):
        raise InvalidRequestError(name, f"{value} is not in {'(' if low_open else '['}{low:g}, {high:g}]")


def check_utf8(field: str, text: str) -> None:
    """Raises InvalidRequestError for a lone surrogate: JSON may spell one, but no UTF-8 text holds it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(field, f"holds a lone surrogate at position {error.start}") from None


def short_int(value: int) -> str:
    """For a message: int -> str is quadratic, and refuses more than 4300 digits."""
    return str(value) if value.bit_length() < 128 else f"an integer of {value.bit_length()} bits"
