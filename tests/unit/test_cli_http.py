"""The commands as HTTP clients, against a server of the standard library that answers by a script."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from rayllm.cli.bench.load import run_load, summarize
from rayllm.cli.bench.transports import HttpTransport
from rayllm.cli.chat_backend import HttpBackend
from rayllm.cli.http_api import check_status, first_model, parse_event
from rayllm.cli.options import SamplingOptions
from rayllm.core.errors import EngineUnavailableError, RayLLMError


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    events: list[str]
    status = 200
    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._send(200, json.dumps({"object": "list", "data": [{"id": "tiny"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append({"path": self.path, **body})
        if self.status != 200:
            self._send(self.status, b'{"error": {"message": "top_p: 3 is not in (0, 1]"}}')
        else:
            self._send(200, "".join(f"{event}\n\n" for event in self.events).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[type[Handler], str]]:
    handler = type("Scripted", (Handler,), {"events": [], "bodies": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


def event(**body: Any) -> str:
    return f"data: {json.dumps(body)}"


def test_chat_streams_what_the_server_says(server):
    handler, url = server
    handler.events = [
        event(choices=[{"delta": {"role": "assistant", "content": ""}}]),
        ": a comment",
        event(choices=[{"delta": {"content": "안"}}]),
        event(choices=[{"delta": {"content": "녕"}, "finish_reason": "stop"}]),
        event(choices=[], usage={"total_tokens": 3}),
        "data: [DONE]",
    ]
    messages = [{"role": "user", "content": "hi"}]
    with closing(HttpBackend(f"{url}/", SamplingOptions(temperature=0.5, stop=["x"]))) as backend:
        assert backend.name == "tiny"
        assert "".join(backend.answer(messages)) == "안녕"
        handler.status = 400
        with pytest.raises(RayLLMError, match=r"^the server answered 400: top_p: 3 is not in \(0, 1\]$"):
            list(backend.answer(messages))
    body = handler.bodies[0]
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["messages"], body["stream"]) == ("tiny", messages, True)
    assert (body["temperature"], body["stop"], body["max_tokens"]) == (0.5, ["x"], 256)
    assert "seed" not in body


async def test_bench_counts_the_tokens_of_each_piece(server):
    handler, url = server
    handler.events = [
        event(choices=[{"text": "", "token_ids": [3]}]),
        event(choices=[{"text": "ab", "token_ids": [4, 5]}]),
        "data: [DONE]",
    ]
    transport = await HttpTransport.connect(url)
    try:
        records, duration_s = await run_load(
            transport, [[1, 2], [3, 4]], output_len=3, concurrency=2, on_done=lambda _: None
        )
    finally:
        await transport.close()
    summary = summarize(records, duration_s, input_len=2)
    assert (summary["requests"], summary["errors"], summary["tokens_per_piece"]) == (2, 0, 1.5)
    assert sorted(body["prompt"] for body in handler.bodies) == [[1, 2], [3, 4]]
    assert {(body["max_tokens"], body["ignore_eos"], body["stream"]) for body in handler.bodies} == {(3, True, True)}


async def test_bench_counts_a_refusal_as_an_error(server):
    handler, url = server
    handler.status = 429
    transport = await HttpTransport.connect(url)
    records, duration_s = await run_load(transport, [[1]], output_len=3, concurrency=1, on_done=lambda _: None)
    await transport.close()
    assert summarize(records, duration_s, input_len=1)["error_messages"] == {
        "the server answered 429: top_p: 3 is not in (0, 1]": 1
    }


def test_nobody_there():
    with pytest.raises(EngineUnavailableError, match=r"^http://127\.0\.0\.1:1: "):
        asyncio.run(HttpTransport.connect("http://127.0.0.1:1"))


def test_answers_that_are_no_answers():
    with pytest.raises(RayLLMError, match="the server answered 502: <html>"):
        check_status(502, b"<html>bad gateway</html>")
    request = httpx.Request("GET", "http://host/v1/models")
    with pytest.raises(RayLLMError, match="no list of models"):
        first_model(httpx.Response(200, text="hello", request=request))
    with pytest.raises(RayLLMError, match="the server ended the stream: lost"):
        parse_event('data: {"error": {"message": "lost"}}')
    with pytest.raises(RayLLMError, match="not JSON"):
        parse_event("data: {")
