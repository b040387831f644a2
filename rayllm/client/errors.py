"""The status of a failed call as one of `rayllm.core.errors`.

The server says what happened in the trailing metadata `error-code`, `error-field` and `retry-after-ms`. Where something
on the way answered instead (a proxy, the channel itself), the status code decides.
"""

from collections.abc import Mapping

import grpc

from rayllm.core.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelOutputError,
    RayLLMError,
    RequestAbortedError,
    RequestExistsError,
)

DEFAULT_RETRY_AFTER_S = 1.0

_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: "invalid_request",
    # Of a model that is not served the server would have said so: this is a proxy that has not heard of it yet.
    grpc.StatusCode.NOT_FOUND: "unavailable",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "over_capacity",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline_exceeded",
    grpc.StatusCode.ALREADY_EXISTS: "request_exists",
    # Of whoever cancels, the server would have said so: this is how HAProxy ends a stream whose replica is gone.
    grpc.StatusCode.CANCELLED: "unavailable",
    grpc.StatusCode.UNAVAILABLE: "unavailable",
}


def error_from_status(status: grpc.StatusCode, details: str, trailing: Mapping[str, str | bytes]) -> RayLLMError:
    code = str(trailing.get("error-code") or _CODES.get(status, "internal"))
    retry_after_s = _retry_after_s(trailing.get("retry-after-ms"))
    match code:
        case "invalid_request":
            field = str(trailing.get("error-field") or "request")
            return InvalidRequestError(field, details.removeprefix(f"{field}: "))
        case "model_not_found":
            return ModelNotFoundError(details)
        case "request_exists":
            return RequestExistsError(details)
        case "over_capacity":
            return CapacityError(details, retry_after_s=retry_after_s)
        case "deadline_exceeded":
            return DeadlineExceededError(details)
        case "aborted":
            return RequestAbortedError(details)
        case "invalid_model_output":
            return ModelOutputError(details)
        case "unavailable":
            return EngineUnavailableError(details, retry_after_s=retry_after_s)
        case _:
            return RayLLMError(f"{status.name}: {details}")


def _retry_after_s(value: str | bytes | None) -> float:
    return int(value) / 1000 if value is not None and value.isdigit() else DEFAULT_RETRY_AFTER_S
