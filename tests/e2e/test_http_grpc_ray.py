"""The whole stack: HAProxy, Ray Serve, a replica, the engine. What the in-process tests cannot see."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from rayllm.core.errors import CheckpointError, ConfigError
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.serve.config import ServeConfig
from rayllm.serve.local import serve_local
from tests.e2e.bad_input import BAD, MODEL, grpc_request, http_body
from tests.e2e.endpoint import SCRIPT, Endpoint, processes, start
from tests.ports import free_ports

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> Path:
    """Three ranks divide it."""
    return make_tiny_model(intermediate_size=96)


@pytest.fixture(scope="module")
def endpoint(model: Path) -> Iterator[Endpoint]:
    """Three ranks, so that the tokens of every test went through shards of their own."""
    endpoint = start(model, tensor=3)
    yield endpoint
    endpoint.stop()


def test_both_faces_equal_the_offline_engine(endpoint, model):
    prompts = ["Once upon a time", "한국어 🙂", "x" * 200]
    for temperature, seed in ((0.0, 0), (0.9, 5)):
        with LLM(str(model), cache=CacheConfig(num_blocks=200)) as llm:
            params = SamplingParams(temperature=temperature, seed=seed, max_tokens=32)
            expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        options = {"model": MODEL, "temperature": temperature, "seed": seed, "max_tokens": 32}
        body = options | {"prompt": prompts, "return_token_ids": True}
        choices = endpoint.http.post("/v1/completions", json=body).json()["choices"]
        assert [choice["token_ids"] for choice in choices] == expected
        sampling = pb.SamplingParams(temperature=temperature, seed=seed, max_tokens=32)
        for prompt, token_ids in zip(prompts, expected, strict=True):
            request = pb.GenerateRequest(model=MODEL, text=prompt, sampling=sampling)
            assert list(endpoint.stub.Generate(request).outputs[0].token_ids) == token_ids
            assert [i for chunk in endpoint.stub.GenerateStream(request) for i in chunk.token_ids] == token_ids


def test_the_openai_client_streams_a_chat(endpoint):
    client = openai.OpenAI(base_url=f"{endpoint.http.base_url}/v1", api_key="none")
    options = {"model": MODEL, "messages": [{"role": "user", "content": "안녕 🙂"}], "max_tokens": 20, "seed": 1}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.system_fingerprint.startswith("w-")


def test_bad_input_on_both_faces(endpoint):
    before = endpoint.load()
    for case, field, bad in BAD:
        response = endpoint.http.post("/v1/completions", content=http_body(bad))
        assert response.status_code == (404 if field == "model" else 400), case
        assert response.json()["error"]["param"] == field, case
        for method in ("Generate", "GenerateStream"):
            with pytest.raises(grpc.RpcError) as refusal:
                list(_as_stream(getattr(endpoint.stub, method)(grpc_request(bad))))
            code = grpc.StatusCode.NOT_FOUND if field == "model" else grpc.StatusCode.INVALID_ARGUMENT
            assert refusal.value.code() is code, case
            assert dict(refusal.value.trailing_metadata())["error-field"] == field, case
    for message in (b"\xff\xff", b"\x0a\x02\xed\xa0", b"\xf8\x7f\x01"):
        with pytest.raises(grpc.RpcError) as refusal:
            endpoint.channel.unary_unary("/rayllm.v1.Inference/Generate")(message)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert endpoint.http.post("/v1/completions", content=b"{").status_code == 400
    assert endpoint.http.get("/nowhere").json()["error"]["code"] == "not_found"
    assert endpoint.load().prompt_tokens == before.prompt_tokens


def _as_stream(answer: object) -> object:
    return [answer] if isinstance(answer, pb.GenerateResponse) else answer


LONG = {"model": MODEL, "prompt": "a long answer", "max_tokens": 480, "ignore_eos": True}


def test_clients_that_leave_free_their_blocks(endpoint):
    with endpoint.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 4}) as response:
        next(response.iter_bytes())
    endpoint.settled()
    with pytest.raises(httpx.ReadTimeout):
        endpoint.http.post("/v1/completions", json=LONG | {"n": 4}, timeout=0.2)
    endpoint.settled()
    request = pb.GenerateRequest(
        model=MODEL, text="x", sampling=pb.SamplingParams(max_tokens=480, ignore_eos=True, n=4)
    )
    stream = endpoint.stub.GenerateStream(request)
    next(stream)
    stream.cancel()
    endpoint.settled()
    with pytest.raises(grpc.RpcError) as refusal:
        endpoint.stub.Generate(request, timeout=0.1)
    assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    endpoint.settled()
    request.timeout_ms = 100
    for method in ("Generate", "GenerateStream"):
        with pytest.raises(grpc.RpcError) as refusal:
            list(_as_stream(getattr(endpoint.stub, method)(request)))
        assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    response = endpoint.http.post("/v1/completions", json=LONG | {"timeout_ms": 50, "n": 4})
    assert response.status_code == 504
    endpoint.settled()


def test_abort_reaches_a_request_of_the_other_face(endpoint):
    answers = []
    body = LONG | {"n": 4, "request_id": "to-be-aborted"}
    thread = threading.Thread(target=lambda: answers.append(endpoint.http.post("/v1/completions", json=body)))
    thread.start()
    while not endpoint.stub.Abort(pb.AbortRequest(request_id="to-be-aborted")).aborted:
        time.sleep(0.005)
    thread.join()
    assert answers[0].status_code == 499
    assert answers[0].json()["error"]["code"] == "aborted"
    endpoint.settled()


async def test_a_burst_is_refused_at_once(endpoint):
    """32 requests for 8 places."""
    async with httpx.AsyncClient(base_url=endpoint.http.base_url, timeout=60) as http:

        async def ask() -> tuple[httpx.Response, float]:
            started = time.monotonic()
            response = await http.post("/v1/completions", json=LONG)
            return response, time.monotonic() - started

        await http.get("/health")
        answers = await asyncio.gather(*(ask() for _ in range(32)))
    refused = [(response, took) for response, took in answers if response.status_code == 429]
    assert len(answers) - len(refused) >= 8
    assert refused
    assert all(int(response.headers["retry-after"]) >= 1 for response, _ in refused)
    assert {response.status_code for response, _ in answers} == {200, 429}
    endpoint.settled()


def test_streams_outlive_a_shard(endpoint):
    """Four at once over either face, greedy and sampled; the text is that of an undisturbed run."""
    bodies = [
        LONG | {"prompt": f"tale {i}", "max_tokens": 150, "temperature": i % 2, "seed": i, "stream": True}
        for i in range(2)
    ]
    params = pb.SamplingParams(max_tokens=150, ignore_eos=True, seed=7)
    requests = [pb.GenerateRequest(model=MODEL, text=f"tale {i}", sampling=params) for i in range(2)]

    def over_http(body: dict[str, object]) -> str:
        with endpoint.http.stream("POST", "/v1/completions", json=body) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert events.pop() == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    def over_grpc(request: pb.GenerateRequest) -> str:
        return "".join(chunk.text for chunk in endpoint.stub.GenerateStream(request))

    with ThreadPoolExecutor() as threads:

        def ask() -> list[Future[str]]:
            asked = [threads.submit(over_http, body) for body in bodies]
            return asked + [threads.submit(over_grpc, request) for request in requests]

        expected = [answer.result() for answer in ask()]
        disturbed = ask()
        while endpoint.load().running < 4:
            time.sleep(0.005)
        os.kill(min(endpoint.shards()), signal.SIGKILL)
        assert [answer.result() for answer in disturbed] == expected
    assert endpoint.load().recoveries == 1
    endpoint.settled()


def test_health_reflection_and_metrics(endpoint):
    health = health_pb2_grpc.HealthStub(endpoint.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answer = next(reflection_pb2_grpc.ServerReflectionStub(endpoint.channel).ServerReflectionInfo(asked))
    services = {service.name for service in answer.list_services_response.service}
    assert {"rayllm.v1.Inference", "grpc.health.v1.Health"} <= services
    assert endpoint.http.get("/health").status_code == 200
    metrics = endpoint.http.get("/metrics").text
    assert 'rayllm_requests_total{face="grpc",outcome="cancelled",replica=' in metrics
    assert re.search(r'^rayllm_kv_cache_usage{replica="\w+"} 0.0$', metrics, re.MULTILINE)


def test_ctrl_c_drains_and_leaves_no_process(tiny_model):
    endpoint = start(tiny_model)
    body = LONG | {"n": 4, "stream": True, "stream_options": {"include_usage": True}}
    with endpoint.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        # As a terminal does: to the whole process group.
        os.killpg(endpoint.process.pid, signal.SIGINT)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 4 * 480
    assert endpoint.process.wait(timeout=60) == 0
    endpoint.channel.close()
    give_up = time.monotonic() + 10
    while left := processes(endpoint.mark):
        assert time.monotonic() < give_up, left
        time.sleep(0.1)


def test_a_start_that_cannot_work_says_why_at_once(tiny_model, tmp_path):
    def attempt(**options: object) -> None:
        engine = EngineConfig(
            model=ModelConfig(model=str(options.pop("model", tiny_model))), **options.pop("engine", {})
        )
        serve_local(ServeConfig(engine=engine, **options))

    started = time.monotonic()
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"http_port: port {port} cannot be used: address already in use"):
            attempt(http_port=port)
        with pytest.raises(ConfigError, match=f"grpc_port: port {port}"):
            attempt(grpc_port=port)
    with pytest.raises((CheckpointError, ConfigError), match=str(tmp_path)):
        attempt(model=tmp_path)
    with pytest.raises(ConfigError, match=r"4|tensor"):
        attempt(engine={"parallel": ParallelConfig(tensor=4)})
    assert time.monotonic() - started < 5


def test_a_replica_that_cannot_start_says_why_and_leaves_no_process(tiny_model):
    script = SCRIPT.replace("num_blocks=200", "num_blocks=10**11")
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", script, str(tiny_model), *map(str, free_ports(2)), "1", "120", "1", "4", "4"]
    env = os.environ | {"SERVE_TEST_MARK": mark}
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, env=env, check=False)
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert "the replica did not start: KV cache: 100000000000 blocks" in last_line
    assert last_line.endswith("which cannot be allocated")
    assert result.stdout == ""
    assert processes(mark) == []
