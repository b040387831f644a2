"""The same scores from an endpoint as from the engine in this process; rayllm's, or one that is only compatible."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.core.errors import CapacityError, ConfigError, EngineUnavailableError, RayLLMError
from rayllm.eval.data import Data, Table
from rayllm.eval.grpc_backend import GrpcBackend
from rayllm.eval.http_backend import HttpBackend
from rayllm.eval.local_backend import LocalBackend
from rayllm.eval.task import Generate, Generated, Loglikelihood
from tests.eval_documents import ANATOMY, PAGES, PIQA
from tests.eval_runs import answers, rows, run, write_table

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    for split, some in ANATOMY.items():
        write_table(folder, Table(name="cais/mmlu", config="anatomy", split=split, columns=()), some)
    write_table(folder, Table(name="baber/piqa", split="validation", columns=()), PIQA["validation"])
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in PAGES))
    return Data(folder)


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Iterator[LocalBackend]:
    yield from opened(tiny_model, 510)


@pytest.fixture(scope="module")
def local_511(tiny_model: Path) -> Iterator[LocalBackend]:
    """Over gRPC a prompt may be one token longer: the last one of a continuation is not sent."""
    yield from opened(tiny_model, 511)


def opened(tiny_model: Path, max_model_len: int) -> Iterator[LocalBackend]:
    model = ModelConfig(model=str(tiny_model), max_model_len=max_model_len)
    backend = LocalBackend.open(EngineConfig(model=model, cache=CacheConfig(num_blocks=100)))
    yield backend
    backend.close()


@pytest.mark.parametrize("face", ["http", "grpc"])
async def test_the_same_scores(face, server, local, local_511, data, tmp_path):
    backend: Any = await asyncio.to_thread(connect, face, server)
    local = local if face == "http" else local_511
    for task, shots in (("mmlu_anatomy", 2), ("piqa", 0), ("perplexity", 0)):
        run(task, local, data, tmp_path / "local", num_fewshot=shots)
        await asyncio.to_thread(run, task, backend, data, tmp_path / "served", num_fewshot=shots)
        for ours, theirs in zip(rows(tmp_path / "local", task), rows(tmp_path / "served", task), strict=True):
            assert theirs["extracted"] == ours["extracted"]
            for one, other in zip(ours["responses"], theirs["responses"], strict=True):
                assert other == {**one, "logprob": pytest.approx(one["logprob"], abs=2e-5)}
            assert theirs["weight_version"] == server.weights
    assert backend.usage.cached_tokens > 0
    backend.close()


def connect(face: str, server: Any) -> HttpBackend | GrpcBackend:
    return HttpBackend(server.url) if face == "http" else GrpcBackend(f"grpc://{server.grpc_address}")


async def test_a_server_that_only_echoes(server, local, data, tmp_path):
    """The scores that OpenAI's own parameters give: the prompt echoed with log-probabilities."""
    backend = await asyncio.to_thread(HttpBackend, server.url)
    backend._spans = None
    for task, shots in (("mmlu_anatomy", 1), ("piqa", 0)):
        run(task, local, data, tmp_path / "local", num_fewshot=shots)
        await asyncio.to_thread(run, task, backend, data, tmp_path / "served", num_fewshot=shots)
        for (ours, logprobs), (theirs, others) in zip(
            answers(tmp_path / "local", task), answers(tmp_path / "served", task), strict=True
        ):
            assert theirs == ours
            assert others == pytest.approx(logprobs, abs=2e-5)
    with pytest.raises(ConfigError, match="needs a model here or an endpoint of rayllm's"):
        await asyncio.to_thread(run, "perplexity", backend, data)
    backend.close()


@pytest.mark.parametrize("face", ["http", "grpc"])
async def test_the_same_texts(face, server, local):
    backend = await asyncio.to_thread(connect, face, server)
    requests = [
        Generate(prompt="and the", max_tokens=6),
        Generate(prompt="and the", max_tokens=6, temperature=1.0, n=3),
        Generate(prompt=(("user", "hi"),), max_tokens=6, temperature=0.5),
        Generate(prompt=(("user", "hi"),), prefix="the", max_tokens=6),
        Generate(prompt="and", until=("a", "e", "t"), max_tokens=20, temperature=1.0),
    ]
    seeds = [5, 6, 7, 8, 9]

    def texts(backend: Any) -> dict[int, Generated]:
        heard: dict[int, Generated] = {}
        backend.run(requests, seeds, heard.__setitem__)
        return heard

    assert await asyncio.to_thread(texts, backend) == texts(local)
    backend.close()


@pytest.mark.parametrize(("face", "longest"), [("http", 510), ("grpc", 511)])
async def test_too_long_for_the_server(face, longest, server):
    backend = await asyncio.to_thread(connect, face, server)
    with pytest.raises(ConfigError, match=f"longer than the {longest} that the model reads"):
        await asyncio.to_thread(
            backend.run, [Loglikelihood(context="a" * 600, continuation=" b")], [0], lambda index, response: None
        )
    backend.close()


async def test_a_full_server_is_asked_again(server, local_511, monkeypatch):
    """Each prompt is refused once."""
    backend = await asyncio.to_thread(GrpcBackend, f"grpc://{server.grpc_address}")
    prepare, refused = server.service.prepare, []

    async def refuse_each_once(call):
        if call.prompts[0] not in refused:
            refused.append(call.prompts[0])
            raise CapacityError("the queue is full", retry_after_s=0.01)
        return await prepare(call)

    monkeypatch.setattr(server.service, "prepare", refuse_each_once)
    requests = [Loglikelihood(context="and", continuation=c) for c in (" the", " a", " of the")]
    heard: dict[int, Any] = {}
    await asyncio.to_thread(backend.run, requests, [0, 0, 0], heard.__setitem__)
    expected: dict[int, Any] = {}
    local_511.run(requests, [0, 0, 0], expected.__setitem__)
    assert refused
    assert {i: each.logprob for i, each in heard.items()} == pytest.approx(
        {i: each.logprob for i, each in expected.items()}, abs=2e-5
    )
    backend.close()


async def test_weights_that_change_meanwhile_end_the_run(server):
    backend = await asyncio.to_thread(GrpcBackend, f"grpc://{server.grpc_address}")
    backend.weight_version = "w-before"
    with pytest.raises(RayLLMError, match=f"have changed from w-before to {server.weights} while they were evaluated"):
        await asyncio.to_thread(backend.run, [Generate(prompt="x")], [0], lambda index, response: None)
    backend.close()


async def test_no_grpc_endpoint_there(server):
    with pytest.raises(EngineUnavailableError, match=r"^grpc://127\.0\.0\.1:1: "):
        GrpcBackend("grpc://127.0.0.1:1")
    http_port = server.url.removeprefix("http://")
    with pytest.raises(RayLLMError, match=f"^grpc://{http_port}: "):
        await asyncio.to_thread(GrpcBackend, f"grpc://{http_port}")
    other = grpc.aio.server()  # speaks gRPC, but not ours
    port = other.add_insecure_port("127.0.0.1:0")
    await other.start()
    with pytest.raises(RayLLMError, match=r"is this an endpoint of rayllm's gRPC API\?"):
        await asyncio.to_thread(GrpcBackend, f"grpc://127.0.0.1:{port}")
    await other.stop(None)


class _Odd(http.server.BaseHTTPRequestHandler):
    """Busy at first; lists a model; answers completions without log-probabilities."""

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.asked < 3:
            self.reply(503, {}, {"retry-after": "0.01"})
        else:
            self.reply(200, self.server.models)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.reply(*self.server.answer)

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    server.asked, server.models, server.answer = 0, {"data": [{"id": "odd"}]}, (200, {})
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


async def test_a_busy_server_is_asked_again(odd):
    backend = HttpBackend(odd.url + "/v1")
    assert (backend.model, backend.weight_version, odd.asked) == ("odd", None, 3)
    backend.close()


async def test_what_is_no_such_server(odd):
    odd.models = {"object": "nothing"}
    with pytest.raises(RayLLMError, match="lists no models; is this an OpenAI-compatible server"):
        HttpBackend(odd.url)
    with pytest.raises(EngineUnavailableError, match=r"127\.0\.0\.1:1"):
        HttpBackend("http://127.0.0.1:1")


async def test_a_server_that_refuses_or_gives_no_logprobs(odd):
    backend = HttpBackend(odd.url)
    request = Loglikelihood(context="a", continuation=" b")
    odd.answer = (400, {"error": {"message": "echo is not supported"}})
    with pytest.raises(RayLLMError, match=r"answered 400: .*echo is not supported"):
        backend.run([request], [0], lambda index, response: None)
    odd.answer = (200, {"choices": [{"index": 0, "text": "a b", "logprobs": None}]})
    with pytest.raises(RayLLMError, match="gives no log-probabilities of a prompt"):
        backend.run([request], [0], lambda index, response: None)
    backend.close()
