"""The little of an OpenAI-compatible HTTP API that the commands speak: errors and server-sent events."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from rayllm.core.errors import EngineUnavailableError, RayLLMError


def unreachable(url: str, error: httpx.HTTPError) -> EngineUnavailableError:
    return EngineUnavailableError(f"{url}: {str(error) or type(error).__name__}")


def check_status(status: int, body: bytes) -> None:
    """Raises RayLLMError with the message of an OpenAI error body, or what there is of the body."""
    if status < 400:
        return
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = body[:200].decode(errors="replace").strip()
    raise RayLLMError(f"the server answered {status}: {message}")


def parse_event(line: str) -> dict[str, Any] | None:
    """The JSON of one `data:` line of a stream; None for every other line and for the `[DONE]` that ends it.

    Raises RayLLMError for an error that the server sends in the stream.
    """
    if not line.startswith("data:"):
        return None
    data = line.removeprefix("data:").strip()
    if data == "[DONE]":
        return None
    try:
        event: dict[str, Any] = json.loads(data)
    except ValueError:
        raise RayLLMError(f"the server sent an event that is not JSON: {data[:200]}") from None
    if "error" in event:
        raise RayLLMError(f"the server ended the stream: {event['error'].get('message', 'no reason given')}")
    return event


def first_model(response: httpx.Response) -> str:
    """From the answer to GET /v1/models."""
    check_status(response.status_code, response.content)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise RayLLMError(
            f"{response.url}: the answer is no list of models; is this an OpenAI-compatible server?"
        ) from None


def stream_events(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer; closing the iterator closes the connection, which ends the request."""
    with client.stream("POST", path, json=body) as response:
        if response.status_code >= 400:
            check_status(response.status_code, response.read())
        for line in response.iter_lines():
            if (event := parse_event(line)) is not None:
                yield event
