"""The one table from what went wrong to what a client is told, for both faces.

A client sees the error's stable code, its message and, for a bad request, the field. Whatever is not in the table is a
bug or an operator's matter: it is logged in full and the client learns only that the server failed.
"""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import grpc
import msgspec

from rayllm.core.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelOutputError,
    PermissionDeniedError,
    PromotionError,
    RayLLMError,
    RequestAbortedError,
    RequestExistsError,
)

logger = logging.getLogger(__name__)

_MAX_MESSAGE_CHARS = 1000


class PayloadTooLargeError(RayLLMError):
    """A request's body is larger than this server reads."""

    code: ClassVar[str] = "payload_too_large"


class RouteError(RayLLMError):
    """There is no such path or service."""

    code: ClassVar[str] = "not_found"


class MethodError(RayLLMError):
    """The path is there, but not with this method."""

    code: ClassVar[str] = "method_not_allowed"


@dataclass(frozen=True, slots=True)
class _Status:
    http: int
    grpc: grpc.StatusCode
    type: str  # OpenAI's coarse kind


_INTERNAL = _Status(500, grpc.StatusCode.INTERNAL, "server_error")
_TABLE: dict[type[RayLLMError], _Status] = {
    InvalidRequestError: _Status(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error"),
    PermissionDeniedError: _Status(403, grpc.StatusCode.PERMISSION_DENIED, "permission_error"),
    ModelNotFoundError: _Status(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error"),
    RouteError: _Status(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error"),
    MethodError: _Status(405, grpc.StatusCode.UNIMPLEMENTED, "invalid_request_error"),
    RequestExistsError: _Status(409, grpc.StatusCode.ALREADY_EXISTS, "invalid_request_error"),
    PromotionError: _Status(409, grpc.StatusCode.FAILED_PRECONDITION, "promotion_error"),
    PayloadTooLargeError: _Status(413, grpc.StatusCode.RESOURCE_EXHAUSTED, "invalid_request_error"),
    CapacityError: _Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error"),
    RequestAbortedError: _Status(499, grpc.StatusCode.CANCELLED, "aborted"),
    ModelOutputError: _INTERNAL,
    EngineUnavailableError: _Status(503, grpc.StatusCode.UNAVAILABLE, "server_error"),
    DeadlineExceededError: _Status(504, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout_error"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error as a client may see it."""

    http_status: int
    grpc_status: grpc.StatusCode
    type: str
    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None

    @property
    def openai_body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.field, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def http_headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(math.ceil(self.retry_after_s))}

    @property
    def grpc_trailers(self) -> list[tuple[str, str]]:
        trailers = [("error-code", self.code)]
        if self.field is not None and self.field.isascii() and self.field.isprintable():
            trailers.append(("error-field", self.field))
        if self.retry_after_s is not None:
            trailers.append(("retry-after-ms", str(math.ceil(self.retry_after_s * 1000))))
        return trailers


def failure(error: Exception) -> Failure:
    """What to tell the client. Logs an error that is not the client's."""
    if not isinstance(error, RayLLMError) or type(error) not in _TABLE:
        logger.error("a request failed on an internal error", exc_info=error)
        return Failure(
            http_status=_INTERNAL.http,
            grpc_status=_INTERNAL.grpc,
            type=_INTERNAL.type,
            code=RayLLMError.code,
            message="the server failed on an internal error",
        )
    status = _TABLE[type(error)]
    field = None
    if isinstance(error, InvalidRequestError):
        field = _printable(error.field, 200)
    elif isinstance(error, ModelNotFoundError):
        field = "model"
    elif isinstance(error, RequestExistsError):
        field = "request_id"
    return Failure(
        http_status=status.http,
        grpc_status=status.grpc,
        type=status.type,
        code=error.code,
        message=_printable(str(error), _MAX_MESSAGE_CHARS),
        field=field,
        retry_after_s=error.retry_after_s if isinstance(error, CapacityError | EngineUnavailableError) else None,
    )


def _printable(text: str, max_chars: int) -> str:
    """A message may quote what the client sent: keep it short, and UTF-8."""
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
