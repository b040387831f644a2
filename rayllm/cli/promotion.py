"""What `promote` and `rollback` share: a call to an endpoint's admin routes, and its events as they come."""

from collections.abc import Mapping
from typing import Any

import httpx

from rayllm.cli import http_api
from rayllm.cli.console import note, print_json
from rayllm.core.errors import ConfigError, RayLLMError
from rayllm.serve.admin_key import LOCAL_HOSTS, VARIABLE, find_key


def change_weights(url: str, path: str, body: Mapping[str, Any], *, as_json: bool) -> None:
    """Says what happens as it does, and what is served at the end. Raises RayLLMError when nothing was changed."""
    last: dict[str, Any] = {}
    with _client(url) as client:
        try:
            for event in http_api.stream_events(client, path, dict(body)):
                last |= event
                note(_line(event))
        except httpx.HTTPError as error:
            raise http_api.unreachable(url, error) from None
    if last.get("event") not in ("done", "canary"):
        raise RayLLMError(f"{url}: the endpoint said no more; `rayllm rollback` goes back to what all replicas served")
    if as_json:
        print_json({name: value for name, value in last.items() if name not in ("replicas", "of", "waiting_for")})


def _client(url: str) -> httpx.Client:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"--url: {url!r} is no http:// or https:// address")
    key = find_key(parsed.host, parsed.port or 80)
    if key is None and parsed.host in LOCAL_HOSTS:
        raise ConfigError(f"{url}: no endpoint that you started listens there; for one of somebody else set {VARIABLE}")
    if key is None:
        raise ConfigError(f"{url}: set {VARIABLE} to the key that the endpoint was started with")
    timeout = httpx.Timeout(10.0, read=None)  # weights are read, and a gate measured, for as long as it takes
    return httpx.Client(base_url=url.rstrip("/"), headers={"authorization": f"Bearer {key}"}, timeout=timeout)


def _line(event: Mapping[str, Any]) -> str:
    match event["event"]:
        case "trying":
            return f"{event['weight_version']} goes to {event['replicas']} of {event['of']} replicas"
        case "serving":
            measured = ""
            if "perplexity" in event:
                measured = f"; perplexity {event['perplexity']:.4g}, {event['perplexity_before']:.4g} before"
            return f"served by {event['replicas']}{measured}"
        case "waiting":
            return f"waiting for {', '.join(event['waiting_for'])}, which start or read the weights"
        case "returning":
            return f"back to {event['weight_version']}"
        case "canary":
            return f"{event['candidate']} stays there: promote it without --canary, or roll back"
        case _:
            return f"all replicas serve {event['weight_version']}"
