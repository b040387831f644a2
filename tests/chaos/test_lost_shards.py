"""A shard killed or stopped under streams, many times, and a replica whose shards do not return."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.ray_executor import start_ray
from rayllm_cluster.session import Session
from tests.chaos.conftest import Row
from tests.e2e.bad_input import MODEL
from tests.e2e.endpoint import Endpoint, start
from tests.ray.faults import NUM_STREAMS, answers, config_of, shard_pids, strike

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHORT = {"model": MODEL, "prompt": "once", "max_tokens": 4}

TIMES = 20
DETECTION_S = 2.0
START_S = 5.0  # what a recovery may take besides loading the weights, which for so small a model is nothing


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model(num_key_value_heads=2)  # two ranks divide it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)], ids=["tp2", "pp2"])
async def test_a_shard_is_lost_at_random_moments(
    model: Path, report: list[Row], tensor: int, pipeline: int, number: signal.Signals
) -> None:
    alone = AsyncEngine.start(config_of(model))
    expected = await answers(alone)
    await alone.close()

    rng = random.Random(f"{number.name} {tensor} {pipeline}")
    with Session.start(num_cpus=6):
        engine = await asyncio.to_thread(AsyncEngine.start, config_of(model, tensor, pipeline), start_ray)
        began = time.monotonic()
        assert await answers(engine) == expected
        within_s = time.monotonic() - began
        trials = [await strike(engine, number, rng, expected=expected, within_s=within_s) for _ in range(TIMES)]
        await engine.close()
        assert shard_pids() == set()
    layout = f"TP={tensor}" if tensor > 1 else f"PP={pipeline}"
    row = Row(
        fault=f"{number.name} of one rank of {layout}, {NUM_STREAMS} streams",
        detection_s=[trial.detection_s for trial in trials],
        recovery_s=[trial.recovery_s for trial in trials],
        leaks=[leak for trial in trials for leak in trial.leaks],
    )
    report.append(row)
    assert max(row.detection_s) <= DETECTION_S
    assert max(row.recovery_s) <= START_S
    assert not row.leaks


def test_serve_replaces_a_replica_whose_shards_do_not_return(model: Path, report: list[Row]) -> None:
    """With no time for a recovery at all, clients are told at once, and the endpoint serves again without help."""
    endpoint = start(model, tensor=2, shard_recovery_timeout_s=0)
    try:
        assert endpoint.http.post("/v1/completions", json=SHORT).status_code == 200
        shards = endpoint.shards()
        struck = time.monotonic()
        os.kill(min(shards), signal.SIGKILL)
        while (response := endpoint.http.post("/v1/completions", json=SHORT)).status_code == 200:
            assert time.monotonic() - struck < 2
        told_s = time.monotonic() - struck
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
        statuses = set()
        while (status := _status(endpoint)) != 200:
            statuses.add(status)
            assert time.monotonic() - struck < 90
            time.sleep(0.1)
        serving_s = time.monotonic() - struck
        assert statuses <= {503}
        assert not endpoint.shards() & shards
    finally:
        endpoint.stop()
    report.append(
        Row(fault="a shard that is not replaced, Serve", detection_s=[told_s], recovery_s=[serving_s], leaks=[])
    )


def _status(endpoint: Endpoint) -> int:
    return endpoint.http.post("/v1/completions", json=SHORT).status_code
