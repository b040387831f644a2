"""What belongs to Ray Serve is killed under streams."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
