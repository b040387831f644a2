"""Weights that change under streams, over real shards: each answer is of one version, whatever is lost meanwhile."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rayllm.core.errors import CheckpointError, EngineUnavailableError
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.ray_executor import start_ray
from rayllm.engine.weights import Weights
from rayllm.models.checkpoint import Checkpoint
from tests.checkpoints import flip_a_bit, retrained, sealed
from tests.ray.faults import Answers, answers, config_of, shard_pids

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("session")]


@pytest.fixture(scope="module")
def models(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The old weights, the new ones, and new ones that were damaged."""
    old = make_tiny_model(num_key_value_heads=2)  # two ranks divide it
    directory = tmp_path_factory.mktemp("weights")
    new, damaged = (sealed(retrained(old, directory / name, seed=1)) for name in ("new", "damaged"))
    return [old, new, flip_a_bit(damaged)]


@pytest.fixture(scope="module")
def expected(models: list[Path]) -> list[Answers]:
    """Of one process, without Ray: the old weights', the new ones'."""

    async def run(model: Path) -> Answers:
        engine = AsyncEngine.start(config_of(model))
        result = await answers(engine)
        await engine.close()
        return result

    return [asyncio.run(run(model)) for model in models[:2]]


async def running(engine: AsyncEngine) -> None:
    while engine.stats().running == 0:
        await asyncio.sleep(0.001)


async def close(engine: AsyncEngine) -> None:
    while (stats := engine.stats()).free_blocks != stats.total_blocks:
        await asyncio.sleep(0.001)
    engine.check_integrity()
    await engine.close()
    assert shard_pids() == set()


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
async def test_every_rank_changes_between_two_steps(
    models: list[Path], expected: list[Answers], tensor: int, pipeline: int
) -> None:
    old, new, damaged = models
    engine = await asyncio.to_thread(AsyncEngine.start, config_of(old, tensor, pipeline), start_ray)
    before = engine.weight_version
    for turn in range(2):
        streams = [asyncio.create_task(answers(engine, f"{turn} old "))]
        await running(engine)
        with pytest.raises(CheckpointError, match="is damaged"):
            await engine.load_weights(damaged)
        engine.use_weights(await engine.load_weights(new))
        streams.append(asyncio.create_task(answers(engine, f"{turn} new ")))
        assert await asyncio.gather(*streams) == expected
        engine.use_weights(before)
    await close(engine)


async def test_a_rank_that_cannot_load_changes_nothing(models: list[Path], expected: list[Answers]) -> None:
    """One that only the ranks find: the files are other ones by the time that they read them."""
    engine = await asyncio.to_thread(AsyncEngine.start, config_of(models[0], 2), start_ray)
    with pytest.raises(CheckpointError, match="holds other weights than w-0, as it did before"):
        await asyncio.wrap_future(engine._engine.weights.load(Weights("w-0", str(models[1]))))
    engine.use_weights(await engine.load_weights(models[1]))
    assert await answers(engine) == expected[1]
    assert engine.stats().recoveries == 0
    await close(engine)


async def test_a_rank_that_is_lost_while_it_loads(models: list[Path], expected: list[Answers]) -> None:
    engine = await asyncio.to_thread(AsyncEngine.start, config_of(models[0], 2), start_ray)
    weights = Weights.of(Checkpoint.open(models[1]))
    os.kill(min(shard_pids()), signal.SIGSTOP)
    loading = asyncio.wrap_future(engine._engine.weights.load(weights))
    with pytest.raises(EngineUnavailableError, match="a shard was lost while it loaded the new weights"):
        await loading
    assert await answers(engine) == expected[0]
    assert await engine.load_weights(models[1]) == weights.version
    await close(engine)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
async def test_new_ranks_come_up_with_the_weights_of_the_streams(
    models: list[Path], expected: list[Answers], tensor: int, pipeline: int
) -> None:
    engine = await asyncio.to_thread(AsyncEngine.start, config_of(models[0], tensor, pipeline), start_ray)
    version = await engine.load_weights(models[1])
    old = asyncio.create_task(answers(engine, "old "))
    await running(engine)
    engine.use_weights(version)
    new = asyncio.create_task(answers(engine, "new "))
    await asyncio.sleep(0.05)
    os.kill(max(shard_pids()), signal.SIGKILL)
    assert await asyncio.gather(old, new) == expected
    assert engine.stats().recoveries == 1
    await close(engine)
