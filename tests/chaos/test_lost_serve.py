"""What belongs to Ray Serve is killed under streams."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from tests.chaos.conftest import Row
from tests.chaos.streams import Load, over_grpc
from tests.e2e.endpoint import Endpoint, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MAX_TOKENS = 300
KINDS = 6
PLACES = 16
SERVING_S = 60.0
CONTROLLER = "ray::ServeController"


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path) -> Iterator[Endpoint]:
    endpoint = start(tiny_model, max_num_seqs=PLACES)
    yield endpoint
    endpoint.stop()


async def _texts(endpoint: Endpoint) -> list[str]:
    return await asyncio.gather(*(over_grpc(endpoint, i, MAX_TOKENS) for i in range(KINDS)))


async def _replaced(endpoint: Endpoint, title: str, pid: int, struck: float) -> None:
    while not (found := await asyncio.to_thread(endpoint.named, title)) or pid in found:
        assert time.monotonic() - struck < SERVING_S, f"{title} did not come back"
        await asyncio.sleep(0.1)


async def test_a_killed_controller_is_not_noticed(endpoint: Endpoint, report: list[Row]) -> None:
    expected = await _texts(endpoint)
    replicas = endpoint.named("ray::ServeReplica")
    async with Load(endpoint, expected, MAX_TOKENS) as load:
        await asyncio.sleep(1.0)
        (victim,) = endpoint.named(CONTROLLER)
        struck = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        await _replaced(endpoint, CONTROLLER, victim, struck)
        back_s = time.monotonic() - struck
        await asyncio.sleep(8.0)  # it takes up its work, and must not take what runs for lost
    assert load.failures == []
    assert load.done > 10
    assert endpoint.named("ray::ServeReplica") == replicas
    report.append(
        Row(
            fault="SIGKILL of Serve's controller",
            detection_s=[],
            recovery_s=[back_s],
            leaks=load.failures,
            measured=f"{load.done} requests meanwhile, none failed",
        )
    )


async def _codes(endpoint: Endpoint, codes: set[grpc.StatusCode]) -> None:
    """What is told, all the while, to those that ask without a client that tries again."""
    async with grpc.aio.insecure_channel(endpoint.grpc_address) as channel:
        while True:
            call = InferenceStub(channel).Load(pb.LoadRequest())
            codes.add(await call.code())
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("title", ["bin/haproxy", "ray::HAProxyManager"])
async def test_a_killed_proxy_comes_back(title: str, endpoint: Endpoint, report: list[Row]) -> None:
    """Its connections are cut: who uses the client sees nothing of it, everyone else a connection that is gone."""
    expected = await _texts(endpoint)
    replicas = endpoint.named("ray::ServeReplica")
    streams = [asyncio.create_task(over_grpc(endpoint, i, MAX_TOKENS)) for i in range(KINDS)]
    await asyncio.sleep(0.5)
    codes: set[grpc.StatusCode] = set()
    asking = asyncio.create_task(_codes(endpoint, codes))
    (victim,) = endpoint.named(title)
    struck = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    await _replaced(endpoint, title, victim, struck)
    while True:
        try:
            (await asyncio.to_thread(endpoint.http.get, "/health")).raise_for_status()
            break
        except httpx.HTTPError:
            assert time.monotonic() - struck < SERVING_S
            await asyncio.sleep(0.1)
    back_s = time.monotonic() - struck
    assert await asyncio.gather(*streams) == expected
    while grpc.StatusCode.OK not in codes:  # a channel of gRPC's own pauses longer and longer before it connects again
        assert time.monotonic() - struck < SERVING_S
        await asyncio.sleep(0.1)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert endpoint.named("ray::ServeReplica") == replicas
    endpoint.settled(within_s=10.0)
    report.append(
        Row(
            fault=f"SIGKILL of {title.removeprefix('bin/').removeprefix('ray::')}",
            detection_s=[],
            recovery_s=[back_s],
            leaks=[],
            measured=f"{KINDS} streams went on with the same text",
        )
    )
