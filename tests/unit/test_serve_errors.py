"""The one table of errors: complete, stable, and silent about the server's inside."""

import json
import logging

import grpc
import pytest

from rayllm.core import errors
from rayllm.serve.errors import MethodError, PayloadTooLargeError, RouteError, failure

TABLE = [
    (errors.InvalidRequestError("top_p", "is odd"), 400, "INVALID_ARGUMENT", "invalid_request"),
    (errors.PermissionDeniedError("no key"), 403, "PERMISSION_DENIED", "permission_denied"),
    (errors.ModelNotFoundError("no such model"), 404, "NOT_FOUND", "model_not_found"),
    (RouteError("not here"), 404, "NOT_FOUND", "not_found"),
    (MethodError("not so"), 405, "UNIMPLEMENTED", "method_not_allowed"),
    (errors.RequestExistsError("in use"), 409, "ALREADY_EXISTS", "request_exists"),
    (errors.PromotionError("no good"), 409, "FAILED_PRECONDITION", "promotion_failed"),
    (PayloadTooLargeError("too much"), 413, "RESOURCE_EXHAUSTED", "payload_too_large"),
    (errors.CapacityError("full", retry_after_s=0.2), 429, "RESOURCE_EXHAUSTED", "over_capacity"),
    (errors.RequestAbortedError("gone"), 499, "CANCELLED", "aborted"),
    (errors.ModelOutputError("no finite probabilities"), 500, "INTERNAL", "invalid_model_output"),
    (errors.EngineUnavailableError("lost", retry_after_s=2.5), 503, "UNAVAILABLE", "unavailable"),
    (errors.DeadlineExceededError("late"), 504, "DEADLINE_EXCEEDED", "deadline_exceeded"),
]
INTERNAL = [
    ZeroDivisionError("/root/secret.py"),
    errors.CheckpointError("/root/secret", "is damaged"),
    errors.ConfigError("/root/secret"),
    errors.DataError("/root/secret"),
    errors.TrainingError("/root/secret"),
    errors.DivergedError("/root/secret"),
    OSError(2, "/root/secret"),
]


@pytest.mark.parametrize(("error", "http", "code", "name"), TABLE, ids=lambda value: str(value))
def test_table(error, http, code, name, caplog):
    told = failure(error)
    assert told.http_status == http
    assert told.grpc_status is grpc.StatusCode[code]
    body = json.loads(told.openai_body)["error"]
    assert body["code"] == name
    assert body["message"] == str(error)
    assert dict(told.grpc_trailers)["error-code"] == name
    assert not caplog.records


def test_every_error_of_the_engine_has_an_entry_or_is_internal():
    named = {type(error) for error, *_ in TABLE} | {type(error) for error in INTERNAL} | {errors.RayLLMError}
    all_errors = {value for value in vars(errors).values() if isinstance(value, type)}
    assert {each for each in all_errors if issubclass(each, errors.RayLLMError)} <= named


@pytest.mark.parametrize("error", INTERNAL, ids=lambda error: type(error).__name__)
def test_what_is_not_the_clients_is_logged_and_not_told(error, caplog):
    with caplog.at_level(logging.ERROR):
        told = failure(error)
    assert (told.http_status, told.grpc_status, told.code) == (500, grpc.StatusCode.INTERNAL, "internal")
    assert b"secret" not in told.openai_body
    assert "secret" in caplog.text


def test_field_and_retry_after():
    told = failure(errors.InvalidRequestError("stop[3]", "x"))
    assert json.loads(told.openai_body)["error"]["param"] == "stop[3]"
    assert dict(told.grpc_trailers)["error-field"] == "stop[3]"
    told = failure(errors.CapacityError("full", retry_after_s=0.2))
    assert told.http_headers == {"retry-after": "1"}
    assert dict(told.grpc_trailers)["retry-after-ms"] == "200"


@pytest.mark.parametrize("text", ["lone \ud800", "x" * 100_000, "한국어\n\r\0"])
def test_a_message_may_quote_anything(text):
    told = failure(errors.InvalidRequestError(text, text))
    assert len(told.openai_body) < 5000
    told.message.encode()
    for name, value in told.grpc_trailers:
        assert name.isascii()
        assert value.isascii()
        assert value.isprintable()
