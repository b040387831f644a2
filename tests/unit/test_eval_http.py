"""`rayllm eval --url` against servers that are OpenAI-compatible after their own fashion."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rayllm.core.errors import RayLLMError
from rayllm.eval.http_backend import HttpBackend
from rayllm.eval.task import Generate, Generated, Response

UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
CHAT = (("user", "hi"),)


class Handler(BaseHTTPRequestHandler):
    """Answers with `answers` in turn, each a status, headers and a body; the last one again and again."""

    answers: list[tuple[int, dict[str, str], object]]
    bodies: list[dict[str, Any]]
    keys: list[str | None]

    def do_GET(self) -> None:
        self._send(200, {}, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._send(*(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]))

    def _send(self, status: int, headers: dict[str, str], body: object) -> None:
        self.keys.append(self.headers["authorization"])
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def text(*texts: str | None) -> tuple[int, dict[str, str], object]:
    return 200, {}, {"choices": [{"index": i, "text": each} for i, each in enumerate(texts)]}


@pytest.fixture
def server() -> Iterator[tuple[type[Handler], str]]:
    handler = type("ItsHandler", (Handler,), {"answers": [text("fine")], "bodies": [], "keys": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def texts_of(url: str, request: Generate) -> tuple[str, ...]:
    found: list[Response] = []
    backend = HttpBackend(url)
    backend.run([request], [0], lambda _, response: found.append(response))
    backend.close()
    assert isinstance(found[0], Generated)
    return found[0].texts


def test_texts_end_before_the_first_stop_string(server: tuple[type[Handler], str]) -> None:
    """The server is told of four, and leaves even those in the text."""
    handler, url = server
    handler.answers = [text("one\ndef two", "three\nprint(4)\nclass Five")]
    assert texts_of(url, Generate(prompt="x", until=UNTIL, n=2)) == ("one", "three")
    assert handler.bodies[0]["stop"] == list(UNTIL[:4])
    handler.answers = [(200, {}, {"choices": [{"index": 0, "message": {"content": "six\n#7"}}]})]
    assert texts_of(url, Generate(prompt=CHAT, until=UNTIL)) == ("six",)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"error": "overloaded"}, "answered without choices: {'error': 'overloaded'}"),
        ({"choices": []}, "answered without choices"),
        ({"choices": [{"index": 0, "text": None}]}, "an answer without text: {'index': 0, 'text': None}"),
        ({"choices": [{"index": 0, "message": {"content": None}}]}, "an answer without text"),
        ({"choices": [{"index": i, "text": ""} for i in range(2)]}, "gives 2 answers where 1 are asked for"),
        ([1], "/v1/completions: the answer is no object"),
    ],
)
def test_answers_without_a_text_are_refused(server: tuple[type[Handler], str], body: object, problem: str) -> None:
    handler, url = server
    handler.answers = [(200, {}, body)]
    with pytest.raises(RayLLMError) as caught:
        texts_of(url, Generate(prompt="x"))
    assert str(caught.value).startswith(url)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [
        ("2", 2, 2),
        ("-3", 0, 0),
        ("nan", 1, 1),
        ("soon", 1, 1),
        ("9999", 30, 30),
        pytest.param(format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True), 30, 30, id="tomorrow"),
        pytest.param(format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True), 0, 0, id="yesterday"),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says(
    server: tuple[type[Handler], str], monkeypatch: pytest.MonkeyPatch, after: str, least: float, most: float
) -> None:
    handler, url = server
    waits: list[float] = []
    monkeypatch.setattr("rayllm.eval.http_backend.time.sleep", waits.append)
    handler.answers = [(429, {"retry-after": after}, {}), text("fine")]
    assert texts_of(url, Generate(prompt="x")) == ("fine",)
    (wait,) = waits
    assert least <= wait <= most


@pytest.mark.parametrize(("key", "sent"), [("sk-1", "Bearer sk-1"), ("", None), (None, None)])
def test_a_key_is_sent_where_there_is_one(
    server: tuple[type[Handler], str], monkeypatch: pytest.MonkeyPatch, key: str | None, sent: str | None
) -> None:
    handler, url = server
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    texts_of(url, Generate(prompt="x"))
    assert handler.keys == [sent, sent]
