"""Clients that leave at random times, in every way there is: nothing of their requests stays."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.core.types import Request, SamplingParams
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.engine import Engine
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from rayllm.scheduler.scheduler import SequenceOutput
from tests.chaos.conftest import Row
from tests.e2e.conftest import MODEL, Server, start

NUM_STREAMS = 200
BLOCK_SIZE = 16
COMPANION_BLOCKS = 512 // BLOCK_SIZE  # no sequence of the model can have more
LONG = {"max_tokens": 450, "ignore_eos": True, "temperature": 0.0}
LEFT_WITHIN_STEPS = 300
GONE_S = 5.0


@pytest_asyncio.fixture
async def server(tiny_model: Path) -> AsyncIterator[Server]:
    config = EngineConfig(
        model=ModelConfig(model=str(tiny_model)),
        cache=CacheConfig(num_blocks=1000, block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(max_num_seqs=64, max_waiting_requests=NUM_STREAMS),
    )
    async for each in start(AsyncEngine.start(config), tiny_model):
        yield each


class Steps:
    """The clock of the test: the engine's steps. By the wall's, a busy machine would have clients leave before the
    server has heard of them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []  # after each step: live requests, and blocks in use

    async def until(self, step: int) -> None:
        while len(self.seen) < step:
            await asyncio.sleep(0.005)


async def disconnect_http(server: Server, i: int, leave: Awaitable[None]) -> None:
    body = {"model": MODEL, "prompt": f"tale {i}", "stream": True} | LONG
    asking = asyncio.create_task(server.http.post("/v1/completions", json=body))
    await leave
    asking.cancel()
    await asyncio.wait([asking])


def _request(i: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=MODEL, text=f"tale {i}", request_id=str(i), sampling=pb.SamplingParams(**LONG))


async def _read(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateChunk]) -> None:
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        async for _ in call:
            pass


async def disconnect_grpc(server: Server, i: int, leave: Awaitable[None]) -> None:
    address = server.grpc_address
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        reading = asyncio.create_task(_read(InferenceStub(channel).GenerateStream(_request(i))))
        await leave
    await reading


async def cancel_grpc(server: Server, i: int, leave: Awaitable[None]) -> None:
    call = server.grpc.GenerateStream(_request(i))
    reading = asyncio.create_task(_read(call))
    await leave
    call.cancel()
    await reading


async def abort_http(server: Server, i: int, leave: Awaitable[None]) -> None:
    body = {"model": MODEL, "prompt": f"tale {i}", "stream": True, "request_id": str(i)} | LONG
    asking = asyncio.create_task(server.http.post("/v1/completions", json=body))
    await leave
    await server.grpc.Abort(pb.AbortRequest(request_id=str(i)))
    await asking


LEAVE = (disconnect_http, cancel_grpc, disconnect_grpc, abort_http)


async def keep_stepping(engine: AsyncEngine) -> None:
    """One request after another, so that there are steps to count when everyone else has left."""
    params = SamplingParams(max_tokens=450, ignore_eos=True)
    for i in range(10**6):
        async for _ in engine.generate(Request(request_id=f"companion-{i}", prompt_token_ids=(7,), params=params)):
            pass


async def test_200_streams_are_left_at_random_times(
    server: Server, report: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and blocks are read by the engine's own thread, after each step."""
    clock = Steps()
    seen = clock.seen
    finish = Engine.finish

    def watched(self: Engine) -> list[SequenceOutput]:
        outputs = finish(self)
        with self.lock:
            used = self.scheduler.num_blocks - self.scheduler.free_blocks
            seen.append((len(server.engine._streams), used))
        return outputs

    monkeypatch.setattr(Engine, "finish", watched)
    await server.http.get("/health")
    await server.grpc.Load(pb.LoadRequest())
    tasks = len(asyncio.all_tasks())
    companion = asyncio.create_task(keep_stepping(server.engine))
    rng = random.Random(0)
    began = time.monotonic()
    await asyncio.gather(
        *(LEAVE[i % 4](server, i, clock.until(rng.randrange(LEFT_WITHIN_STEPS))) for i in range(NUM_STREAMS))
    )
    left = time.monotonic()
    while (live := server.service._live) or len(asyncio.all_tasks()) > tasks + 1:
        assert time.monotonic() - left < GONE_S, (live, asyncio.all_tasks())
        await asyncio.sleep(0.001)
    handlers_s = time.monotonic() - left
    steps = len(seen)
    while len(seen) < steps + 5:
        assert not companion.done()
        await asyncio.sleep(0.001)
    companion.cancel()
    await asyncio.gather(companion, return_exceptions=True)

    last = max(i for i, (live_streams, _) in enumerate(seen) if live_streams > 1)
    most = max(used for _, used in seen)
    assert most > 3 * COMPANION_BLOCKS, "there was something to be freed"
    took = next(i for i, (_, used) in enumerate(seen[last + 1 :]) if used <= COMPANION_BLOCKS)
    assert took <= 2, seen[last - 2 : last + 6]
    while (stats := server.engine.stats()).free_blocks != stats.total_blocks:
        assert time.monotonic() - left < 2 * GONE_S, stats
        await asyncio.sleep(0.001)
    server.engine.check_integrity()
    metrics = server.service.metrics.render().decode()
    ended = sum(
        float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith("rayllm_requests_total")
    )
    started = [line for line in metrics.splitlines() if line.startswith("rayllm_request_seconds_count")]
    assert ended == sum(float(line.rsplit(" ", 1)[1]) for line in started) > NUM_STREAMS / 2
    report.append(
        Row(
            fault=f"{NUM_STREAMS} streams left within {LEFT_WITHIN_STEPS} steps, half by disconnection",
            detection_s=[],
            recovery_s=[handlers_s],
            leaks=[],
            measured=f"blocks free {took} steps later, {most} were in use; {left - began:.1f} s in all",
        )
    )
