"""`rayllm eval --url` against servers that are OpenAI-compatible after their own fashion."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rayllm.core.errors import RayLLMError
from rayllm.eval.http_backend import HttpBackend
from rayllm.eval.task import Generate, Generated, Likelihood, Loglikelihood, Response

UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
CHAT = (("user", "hi"),)


class Handler(BaseHTTPRequestHandler):
    """Answers with `answers` in turn, each a status, headers and a body; the last one again and again."""

    served: ClassVar[dict[str, object]] = {"id": "m"}
    answers: list[tuple[int, dict[str, str], object]]
    bodies: list[dict[str, Any]]
    keys: list[str | None]

    def do_GET(self) -> None:
        self._send(200, {}, {"data": [self.served]})

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
    "body",
    [
        {"choices": [{"text": "no index"}]},
        {"choices": [7]},
        {"choices": [{"index": "first", "text": ""}]},
        {"choices": [{"index": 0, "text": ""}], "usage": 5},
        {"choices": [{"index": 0, "text": ""}], "usage": {"prompt_tokens": "many"}},
    ],
    ids=str,
)
def test_what_cannot_be_understood_is_told(server: tuple[type[Handler], str], body: object) -> None:
    handler, url = server
    handler.answers = [(200, {}, body)]
    with pytest.raises(RayLLMError, match=f"^{url}: gives an answer that cannot be understood"):
        texts_of(url, Generate(prompt="x"))


@pytest.mark.parametrize(
    "changes",
    [
        {"token_logprobs": [None]},
        {"token_logprobs": [None, float("nan")]},
        {"token_logprobs": [None, "low"]},
        {"top_logprobs": [None, None]},
        {"top_logprobs": [None, {}]},
        {"top_logprobs": None},
        {"text_offset": [0, None]},
        {"text_offset": 3},
    ],
    ids=str,
)
def test_log_probabilities_that_are_none(server: tuple[type[Handler], str], changes: dict[str, object]) -> None:
    handler, url = server
    fine = {"text_offset": [0, 1], "token_logprobs": [None, -1.5], "top_logprobs": [None, {" b": -1.5}]}
    request = Loglikelihood(context="a", continuation=" b")
    found: list[Response] = []
    for logprobs in (fine, {**fine, **changes}):
        handler.answers = [(200, {}, {"choices": [{"index": 0, "text": "a b", "logprobs": logprobs}]})]
        backend = HttpBackend(url)
        if logprobs is fine:
            backend.run([request], [0], lambda _, response: found.append(response))
            assert found == [Likelihood(logprob=-1.5, num_tokens=1, is_greedy=True)]
        else:
            with pytest.raises(RayLLMError, match=f"^{url}: gives an answer that cannot be understood"):
                backend.run([request], [0], lambda _, response: found.append(response))
        backend.close()


def test_weights_that_change_meanwhile_end_the_run(server: tuple[type[Handler], str]) -> None:
    handler, url = server
    handler.served = {
        "id": "m", "owned_by": "rayllm", "system_fingerprint": "w1", "max_model_len": 99,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    first, second = ((200, {}, {**text("fine")[2], "system_fingerprint": version}) for version in ("w1", "w2"))
    handler.answers = [(200, {}, {"prompt": "<s>"}), first, second]
    backend = HttpBackend(url)
    assert backend.weight_version == "w1"
    backend.run([Generate(prompt="x")], [0], lambda _, response: None)
    with pytest.raises(RayLLMError, match="its weights have changed from w1 to w2 while they were evaluated"):
        backend.run([Generate(prompt="x")], [0], lambda _, response: None)
    backend.close()


def test_a_server_that_stays_busy(server: tuple[type[Handler], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times; nobody waits after the last."""
    handler, url = server
    waits: list[float] = []
    monkeypatch.setattr("rayllm.eval.http_backend.time.sleep", waits.append)
    handler.answers = [(503, {"retry-after": "1"}, {})]
    with pytest.raises(RayLLMError, match="answered 503"):
        texts_of(url, Generate(prompt="x"))
    assert len(handler.bodies) == 8
    assert waits == [1, 2, 3, 4, 5, 6, 7]


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


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_stops_answering_holds_nobody_up(
    server: tuple[type[Handler], str], tmp_path: Path, end: signal.Signals
) -> None:
    handler, url = server
    asked = threading.Event()

    def silent(self: Handler) -> None:
        asked.set()
        time.sleep(60)

    handler.do_POST = silent  # type: ignore[method-assign]
    row = {"goal": "to sit", "sol1": "a chair", "sol2": "a knife", "label": 0}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "rayllm", "eval", "--url", url, "--tasks", "piqa", "--data", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert asked.wait(120)
            process.send_signal(end)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == (130 if end is signal.SIGINT else 143), stderr
    assert "Traceback" not in stderr
