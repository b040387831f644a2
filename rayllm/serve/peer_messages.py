"""What replicas say to each other, as msgpack. Never pickled; knows nothing of connections."""

import time
from dataclasses import replace
from typing import Final

import msgspec

from rayllm.core.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelOutputError,
    RayLLMError,
    RequestAbortedError,
)
from rayllm.core.types import Request
from rayllm.engine.outputs import OutputDelta
from rayllm.serve.replica_state import ReplicaState

MAX_MESSAGE_BYTES: Final = 64 << 20

_PLAIN = {error.code: error for error in (DeadlineExceededError, RequestAbortedError, ModelOutputError)}


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Asks for the other's state, now and whenever it changes."""


class Run(msgspec.Struct, frozen=True, tag="run"):
    """A request to be answered there. Clocks differ between machines: `timeout_s` stands for its deadline.
    `cached_tokens`: how much of the prompt is thought to be in the other's cache."""

    request: Request
    timeout_s: float | None
    cached_tokens: int

    @classmethod
    def of(cls, request: Request, cached_tokens: int) -> "Run":
        timeout_s = None if request.deadline is None else request.deadline - time.monotonic()
        return cls(replace(request, deadline=None), timeout_s, cached_tokens)

    def request_as(self, request_id: str) -> Request:
        deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        return replace(self.request, request_id=request_id, deadline=deadline)


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Ends the request that its client knows by this id, if it came in there."""

    request_id: str


class Piece(msgspec.Struct, frozen=True, tag="piece", array_like=True):
    delta: OutputDelta


class Done(msgspec.Struct, frozen=True, tag="done", array_like=True):
    """The answer is complete."""


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """The answer ends with an error. `code` is the error's."""

    code: str
    message: str
    field: str | None = None
    retry_after_s: float = 0.0

    @classmethod
    def of(cls, error: RayLLMError) -> "Failed":
        if isinstance(error, InvalidRequestError):
            return cls(error.code, error.problem, field=error.field)
        if isinstance(error, CapacityError | EngineUnavailableError):
            return cls(error.code, str(error), retry_after_s=error.retry_after_s)
        return cls(error.code, str(error))

    def error(self) -> RayLLMError:
        """An error of its class again; RayLLMError itself for one that no client is told of."""
        if self.code == InvalidRequestError.code:
            return InvalidRequestError(self.field or "", self.message)
        if self.code == CapacityError.code:
            return CapacityError(self.message, retry_after_s=self.retry_after_s)
        if self.code == EngineUnavailableError.code:
            return EngineUnavailableError(self.message, retry_after_s=self.retry_after_s)
        return _PLAIN.get(self.code, RayLLMError)(self.message)


class Aborted(msgspec.Struct, frozen=True, tag="aborted", array_like=True):
    """`was_live`: such a request had come in there, and has ended now."""

    was_live: bool


Question = Watch | Run | Abort
Answer = Piece | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_state = msgspec.msgpack.Decoder(ReplicaState).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_aborted = msgspec.msgpack.Decoder(Aborted).decode
