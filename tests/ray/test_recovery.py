"""A lost shard is a preemption of everything: streams go on with the very same text, within bounds, and nothing leaks.

The long form of these, with a table of figures, is `make chaos`.
"""

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayllm.core.errors import CapacityError, DeadlineExceededError, EngineUnavailableError, RequestAbortedError
from rayllm.core.types import Request, SamplingParams
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.llm import LLM
from rayllm.engine.ray_executor import start_ray
from tests.ray.faults import Answers, answer, answers, config_of, noticing, shard_pids, strike
from tests.ray.processes import wait_gone

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


def request(name: str, **options: float) -> Request:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=(1, 2, 3), params=params, **options)


async def settled(engine: AsyncEngine) -> None:
    while (stats := engine.stats()).free_blocks != stats.total_blocks:
        await asyncio.sleep(0.001)
    engine.check_integrity()


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
        assert trial.detection_s < 2
        assert trial.leaks == []
    await engine.close()
    assert shard_pids() == set()


async def test_a_shard_that_is_killed_while_it_loads(model: Path, expected: Answers) -> None:
    """Of the first ranks: the weights are loaded again, and the streams know nothing of it."""

    def kill_one() -> None:
        while not (shards := shard_pids()):
            time.sleep(0.01)
        time.sleep(0.7)  # in the middle of importing torch
        os.kill(min(shards), signal.SIGKILL)

    with noticing() as noticed:
        killer = asyncio.create_task(asyncio.to_thread(kill_one))
        engine = await asyncio.to_thread(AsyncEngine.start, config_of(model, 2), start_ray)
        await killer
    assert len(noticed) == 1
    assert await answers(engine) == expected
    await engine.close()


async def test_losses_one_after_another(model: Path, expected: Answers) -> None:
    """While nothing runs, while the new shards load, and again in the first steps of those that follow."""
    engine = await asyncio.to_thread(AsyncEngine.start, config_of(model, 2), start_ray)
    first = shard_pids()
    with noticing() as noticed:
        os.kill(min(first), signal.SIGKILL)
        while not (second := shard_pids() - first):
            await asyncio.sleep(0.01)
        streams = asyncio.create_task(answers(engine))
        await asyncio.sleep(0.7)
        engine.check_health()
        os.kill(min(second), signal.SIGSTOP)
        while engine.stats().running == 0:
            await asyncio.sleep(0.001)
        os.kill(max(shard_pids()), signal.SIGKILL)
        assert await streams == expected
    assert len(noticed) == 3
    assert len(shard_pids()) == 2
    assert engine.stats().recoveries == 2
    await settled(engine)
    await engine.close()


async def test_requests_during_a_recovery(model: Path) -> None:
    """They queue, and are aborted, cancelled or out of time at once."""
    config = config_of(model, 2, max_num_seqs=1, max_waiting_requests=3)  # the one that ran has its place again
    engine = await asyncio.to_thread(AsyncEngine.start, config, start_ray)
    running = asyncio.create_task(answer(engine, request("running")))
    while engine.stats().running == 0:
        await asyncio.sleep(0.001)
    for pid in shard_pids():
        os.kill(pid, signal.SIGKILL)
    while engine.stats().running:
        await asyncio.sleep(0.001)
    struck = time.monotonic()
    late = asyncio.create_task(answer(engine, request("late", deadline=struck + 0.2)))
    aborted = asyncio.create_task(answer(engine, request("aborted")))
    cancelled = asyncio.create_task(answer(engine, request("cancelled")))
    await asyncio.sleep(0)
    with pytest.raises(CapacityError):
        await answer(engine, request("one too many"))
    assert engine.abort("aborted")
    cancelled.cancel()
    with pytest.raises(RequestAbortedError):
        await aborted
    with pytest.raises(DeadlineExceededError):
        await late
    assert engine.stats().waiting == 1
    assert time.monotonic() - struck < 1
    assert engine.stats().recoveries == 0, "all that while the shards were not back"
    assert len((await running)[0]) == 60
    await settled(engine)
    await engine.close()


async def test_closing_does_not_wait_for_a_recovery(model: Path) -> None:
    engine = await asyncio.to_thread(AsyncEngine.start, config_of(model, 2), start_ray)
    running = asyncio.create_task(answer(engine, request("running")))
    while engine.stats().running == 0:
        await asyncio.sleep(0.001)
    os.kill(min(shard_pids()), signal.SIGKILL)
    while engine.stats().running:
        await asyncio.sleep(0.001)
    await asyncio.sleep(1)
    struck = time.monotonic()
    await engine.close()
    assert time.monotonic() - struck < 2
    with pytest.raises(EngineUnavailableError, match="shutting down"):
        await running
    wait_gone(shard_pids(), timeout_s=5)  # those that were to replace them had perhaps just begun
    assert shard_pids() == set()


async def test_a_request_that_kills_its_shards_ends_alone(model: Path) -> None:
    """Whoever runs when shards are lost three times, and got no further in between, is taken for the cause."""
    engine = await asyncio.to_thread(AsyncEngine.start, config_of(model, 2), start_ray)
    poison = asyncio.create_task(answer(engine, request("poison")))
    for _ in range(3):
        while engine.stats().running == 0:
            await asyncio.sleep(0.001)
        os.kill(min(shard_pids()), signal.SIGKILL)
        while engine.stats().running:
            await asyncio.sleep(0.001)
    with pytest.raises(EngineUnavailableError, match="its process died, again and again while this request ran"):
        await poison
    assert len((await answer(engine, request("after it")))[0]) == 60
    assert engine.stats().recoveries == 3
    await settled(engine)
    await engine.close()


def test_offline_too(model: Path) -> None:
    prompts = [[1, 2, 3], list(range(50)), [9] * 7]
    params = SamplingParams(temperature=0.8, seed=2, max_tokens=80, ignore_eos=True)
    with LLM(str(model), dtype="float32") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with LLM(str(model), dtype="float32", tensor_parallel_size=2) as llm:
        victim = min(shard_pids())
        killer = threading.Timer(0.2, os.kill, (victim, signal.SIGKILL))
        with noticing() as noticed:
            killer.start()
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
            killer.join()
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        assert len(noticed) == 1
