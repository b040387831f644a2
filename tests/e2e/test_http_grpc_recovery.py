"""What clients of either face see of a lost shard: nothing, or a typed error when it cannot be replaced in time."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.ray_executor import start_ray
from rayllm.proto.v1 import inference_pb2 as pb
from tests.e2e.conftest import MODEL, Server, start
from tests.ray.faults import shard_pids

pytestmark = pytest.mark.ray

RECOVERY_S = 12.0  # several times what new shards take here, for the test in which they do come

BODY = {"model": MODEL, "prompt": "a long answer", "max_tokens": 480, "ignore_eos": True, "seed": 3}
REQUEST = pb.GenerateRequest(
    model=MODEL,
    text="a long answer",
    sampling=pb.SamplingParams(max_tokens=480, ignore_eos=True, seed=3),
)


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> Path:
    """Its own, for its weights go away; two ranks divide it."""
    return make_tiny_model(num_key_value_heads=2)


@pytest_asyncio.fixture
async def sharded_server(model: Path) -> AsyncIterator[Server]:
    config = EngineConfig(
        model=ModelConfig(model=str(model), dtype="float32", device="cpu"),
        parallel=ParallelConfig(tensor=2, shard_recovery_timeout_s=RECOVERY_S),
        cache=CacheConfig(num_blocks=100),
    )
    engine = await asyncio.to_thread(AsyncEngine.start, config, start_ray)
    async for server in start(engine, model):
        yield server


async def test_past_the_recovery_timeout_clients_have_typed_errors(sharded_server: Server, model: Path) -> None:
    server = sharded_server

    async def stream_http() -> list[str]:
        async with server.http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            return [line async for line in response.aiter_lines() if line]

    victim = min(shard_pids())
    (model / "model.safetensors").unlink()  # so that no new shard can load
    calls = [asyncio.create_task(server.generate(method, REQUEST)) for method in ("Generate", "GenerateStream")]
    unary = asyncio.create_task(server.http.post("/v1/completions", json=BODY))
    streaming = asyncio.create_task(stream_http())
    await server.running(4)
    struck = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    while server.engine.stats().running:
        await asyncio.sleep(0.001)
    queued = asyncio.create_task(server.http.post("/v1/completions", json=BODY))
    assert (await server.http.get("/health")).status_code == 200, "it is being repaired"

    results = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - struck < RECOVERY_S + 3
    for error in results:
        assert isinstance(error, grpc.RpcError)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert f"no new shards were ready within {RECOVERY_S:.0f} s" in error.details()
        assert str(model) not in error.details()
        assert dict(error.trailing_metadata())["retry-after-ms"] == "5000"
    for response in (await unary, await queued, await server.http.post("/v1/completions", json=BODY)):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "unavailable"
    lines = await streaming  # of an answer that had begun, or a body alone
    assert '"code":"unavailable"' in lines[-2 if lines[-1] == "data: [DONE]" else -1]

    assert (await server.http.get("/health")).status_code == 503
    health = health_pb2_grpc.HealthStub(server.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert shard_pids() == set()


async def test_both_faces_stream_on(sharded_server: Server) -> None:
    server = sharded_server

    async def both() -> tuple[str, str]:
        async def over_http() -> str:
            options = {name: value for name, value in BODY.items() if name != "ignore_eos"}
            stream = await server.openai.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def over_grpc() -> str:
            return "".join([chunk.text async for chunk in server.grpc.GenerateStream(REQUEST)])

        return tuple(await asyncio.gather(over_http(), over_grpc()))

    expected = await both()
    assert expected[0] == expected[1]
    for number in (signal.SIGKILL, signal.SIGSTOP):
        streams = asyncio.create_task(both())
        await server.running(2)
        await asyncio.sleep(0.05)
        os.kill(max(shard_pids()), number)
        assert await streams == expected
    load = await server.grpc.Load(pb.LoadRequest())
    assert load.recoveries == 2
    assert 0 < load.last_detection_s < 2
    assert load.last_recovery_s > 0
    metrics = (await server.http.get("/metrics")).text
    assert "rayllm_recoveries_total 2.0" in metrics
    assert f"rayllm_last_recovery_seconds {load.last_recovery_s}" in metrics
