"""A lost shard is a preemption of everything: streams go on with the very same text, within bounds, and nothing leaks.

The long form of these, with a table of figures, is `make chaos`.
"""

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from rayllm.core.errors import DeadlineExceededError, EngineUnavailableError, RequestAbortedError
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.ray_executor import start_ray
from rayllm_cluster.session import Session
from tests.ray.faults import Answers, answers, config_of, shard_pids, strike

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model(num_key_value_heads=2)  # two ranks divide it


@pytest.fixture(scope="module")
def expected(model: Path) -> Answers:
    """Of one process, without Ray."""

    async def run() -> Answers:
        engine = AsyncEngine.start(config_of(model))
        result = await answers(engine)
        await engine.close()
        return result

    return asyncio.run(run())


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
async def test_streams_go_on_after_a_kill_and_a_stop(
    model: Path, expected: Answers, tensor: int, pipeline: int
) -> None:
    engine = AsyncEngine.start(config_of(model, tensor, pipeline), start_ray)
    began = time.monotonic()
    assert await answers(engine) == expected
    within_s = time.monotonic() - began
    for number in (signal.SIGKILL, signal.SIGSTOP):
        trial = await strike(engine, number, random.Random(number), expected=expected, within_s=within_s)
        print(number.name, trial)
        assert trial.detection_s < 2
        assert trial.leaks == []
    await engine.close()
    assert shard_pids() == set()
