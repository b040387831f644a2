"""Weights that change under running requests, in one process: each answer is of one version, the one that a plain
engine with these weights gives."""

import asyncio
import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.core.errors import CheckpointError, EngineUnavailableError, PromotionError
from rayllm.core.types import Request, SamplingParams
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.llm import LLM
from rayllm.models.checkpoint import WEIGHTS, Checkpoint
from rayllm.models.weight_version import weight_version
from rayllm.quant.convert import Recipe, convert
from tests.checkpoints import changed, configured, flip_a_bit, retrained, sealed

LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
SHORT = SamplingParams(temperature=0.9, seed=5, max_tokens=24, ignore_eos=True)
PROMPTS = [tuple(range(10 + i, 31 + 3 * i)) for i in range(6)]


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed(retrained(tiny_model, tmp_path_factory.mktemp("other") / "model", seed=1))


@pytest.fixture(scope="module")
def third_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return retrained(tiny_model, tmp_path_factory.mktemp("third") / "model", seed=2)


def config(model: Path) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(model)),
        cache=CacheConfig(num_blocks=160, block_size=4),
        scheduler=SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8),
    )


@contextlib.asynccontextmanager
async def engine_of(model: Path) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine.start(config(model))
    yield engine
    while (stats := engine.stats()).free_blocks != stats.total_blocks:
        await asyncio.sleep(0.001)
    engine.check_integrity()
    await engine.close()


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[AsyncEngine]:
    async with engine_of(tiny_model) as engine:
        yield engine


_names = itertools.count()


def request(prompt: tuple[int, ...], params: SamplingParams, version: str | None = None) -> Request:
    return Request(request_id=str(next(_names)), prompt_token_ids=prompt, params=params, weight_version=version)


async def answer(engine: AsyncEngine, request: Request) -> list[int]:
    return [token async for delta in engine.generate(request) for token in delta.token_ids]


async def answers(engine: AsyncEngine, params: SamplingParams) -> list[list[int]]:
    return list(await asyncio.gather(*(answer(engine, request(prompt, params)) for prompt in PROMPTS)))


@functools.cache
def _plain(model: Path, is_long: bool) -> list[list[int]]:
    params = LONG if is_long else SHORT
    with LLM(str(model), cache=CacheConfig(num_blocks=160, block_size=4)) as llm:
        return [output.outputs[0].token_ids for output in llm.generate([list(prompt) for prompt in PROMPTS], params)]


def plain(model: Path, params: SamplingParams) -> list[list[int]]:
    return _plain(model, params is LONG)


async def running(engine: AsyncEngine, count: int) -> None:
    while engine.stats().running < count:
        await asyncio.sleep(0.001)


async def change(engine: AsyncEngine, model: Path) -> None:
    engine.use_weights(await engine.load_weights(model))


async def test_running_requests_keep_their_weights(engine, tiny_model, other_model):
    old = asyncio.create_task(answers(engine, LONG))
    await running(engine, len(PROMPTS))
    assert engine.weight_version == weight_version(tiny_model)
    await change(engine, other_model)
    assert engine.weight_version == weight_version(other_model)
    new = await answers(engine, SHORT)
    assert not old.done(), "the old requests were to run all the while"
    assert new == plain(other_model, SHORT)
    assert await old == plain(tiny_model, LONG)
    assert new != plain(tiny_model, SHORT)


async def test_weights_that_are_loaded_answer_whoever_names_them(engine, tiny_model, other_model):
    version = await engine.load_weights(other_model)
    assert engine.weight_version == weight_version(tiny_model)
    named, unnamed = await asyncio.gather(
        answer(engine, request(PROMPTS[0], SHORT, version)), answer(engine, request(PROMPTS[0], SHORT))
    )
    assert [named, unnamed] == [plain(other_model, SHORT)[0], plain(tiny_model, SHORT)[0]]


async def test_the_same_model_in_int8_takes_over_and_gives_back(engine, tiny_model, tmp_path):
    convert(Checkpoint.open(tiny_model), tmp_path, Recipe(scheme="w8a16", outliers="none"))
    assert plain(tmp_path, SHORT) != plain(tiny_model, SHORT)
    await change(engine, tmp_path)
    assert await answers(engine, SHORT) == plain(tmp_path, SHORT)
    await change(engine, tiny_model)
    assert await answers(engine, SHORT) == plain(tiny_model, SHORT)


async def test_the_prefix_cache_is_that_of_the_weights(engine, tiny_model, other_model):
    async def cached() -> int:
        deltas = [delta async for delta in engine.generate(request(PROMPTS[5], SHORT))]
        return deltas[0].num_cached_tokens

    whole = len(PROMPTS[5]) // 4 * 4
    assert [await cached(), await cached()] == [0, whole]
    await change(engine, other_model)
    assert [await cached(), await cached()] == [0, whole]
    engine.use_weights(weight_version(tiny_model))
    assert await cached() == whole


async def test_going_back_reads_nothing(tiny_model, other_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    async with engine_of(model) as engine:
        before = engine.weight_version
        await change(engine, other_model)
        shutil.rmtree(model)
        engine.use_weights(before)
        assert await answers(engine, SHORT) == plain(tiny_model, SHORT)


def nan(model: Path, directory: Path) -> Path:
    return changed(model, directory, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan))


def truncated(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    (directory / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-100])
    return directory


def other_tokenizer(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    return directory


def damaged_tokenizer(model: Path, directory: Path) -> Path:
    shutil.copytree(model, directory)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace('"th"', '"ht"'))
    return directory


def missing(model: Path, directory: Path) -> Path:
    sealed(Path(shutil.copytree(model, directory)))
    (directory / "generation_config.json").unlink()
    return directory


def unreadable(model: Path, directory: Path) -> Path:
    """A file that opens and then fails, as on a disk that goes bad; root may read all others."""
    path = Path(shutil.copytree(model, directory)) / "LICENSE"
    path.write_text("free")
    sealed(directory)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    return directory


BAD: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nowhere": (lambda model, directory: directory, "no such directory"),
    "a flipped bit": (lambda model, directory: flip_a_bit(sealed(retrained(model, directory, 3))), "is damaged"),
    "a missing file": (missing, "is missing, though manifest.json names it"),
    "an unreadable file": (unreadable, "LICENSE: cannot be read: Input/output error"),
    "truncated": (truncated, "is truncated or damaged"),
    "NaN": (nan, "up_proj.weight holds NaN or infinity"),
    "another shape": (
        lambda model, directory: configured(model, directory, num_hidden_layers=2),
        r"tensor model.layers.2.* is not part of",
    ),
    "another position": (
        lambda model, directory: configured(
            model, directory, rope_parameters={"rope_type": "default", "rope_theta": 9}
        ),
        "another architecture than the running model's: rope is",
    ),
    "another dtype": (lambda model, directory: configured(model, directory, dtype="bfloat16"), "are torch.bfloat16"),
    "another tokenizer": (other_tokenizer, "the tokenizer differs"),
    "a damaged tokenizer": (damaged_tokenizer, "the tokenizer cannot be loaded: Token `th` out of vocabulary"),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_is_no_replacement_changes_nothing(engine, tiny_model, other_model, tmp_path, name):
    make, message = BAD[name]
    bad = make(tiny_model, tmp_path / "bad")
    streams = asyncio.create_task(answers(engine, SHORT))
    with pytest.raises(CheckpointError, match=message):
        await engine.load_weights(bad)
    assert await streams == plain(tiny_model, SHORT)
    assert engine.weight_version == weight_version(tiny_model)
    engine.check_health()
    await change(engine, other_model)
    assert await answers(engine, SHORT) == plain(other_model, SHORT)


async def test_a_third_version_waits_for_the_requests_of_the_first(engine, other_model, third_model, tiny_model):
    old = asyncio.create_task(answer(engine, request(PROMPTS[0], LONG)))
    await running(engine, 1)
    await change(engine, other_model)
    loading = asyncio.create_task(change(engine, third_model))
    await asyncio.sleep(0.1)
    with pytest.raises(PromotionError, match="are being loaded; try again later"):
        await engine.load_weights(third_model)
    assert not loading.done()
    assert await old == plain(tiny_model, LONG)[0]
    await loading
    assert await answers(engine, SHORT) == plain(third_model, SHORT)
    with pytest.raises(PromotionError, match="are not held any more"):
        engine.use_weights(weight_version(tiny_model))
    with pytest.raises(EngineUnavailableError, match="are not here"):
        await answer(engine, request(PROMPTS[0], SHORT, weight_version(tiny_model)))


async def test_closing_ends_a_load(tiny_model, other_model, third_model):
    engine = AsyncEngine.start(config(tiny_model))
    old = asyncio.create_task(answer(engine, request(PROMPTS[0], LONG)))
    await running(engine, 1)
    await change(engine, other_model)
    loading = asyncio.create_task(engine.load_weights(third_model))
    await asyncio.sleep(0.1)
    await engine.close()
    for task in (loading, old):
        with pytest.raises(EngineUnavailableError, match="shutting down"):
            await task


async def test_changes_under_load(engine, tiny_model, other_model, third_model):
    """Clients that never pause; each answer is, token for token, that of the version which was current as it began."""
    models = {weight_version(model): model for model in (tiny_model, other_model, third_model)}
    expected = {version: plain(model, SHORT) for version, model in models.items()}
    ended = asyncio.Event()
    given: list[str] = []

    async def client(number: int) -> None:
        while not ended.is_set():
            version = engine.weight_version
            assert await answer(engine, request(PROMPTS[number], SHORT)) == expected[version][number]
            given.append(version)

    clients = [asyncio.create_task(client(number)) for number in range(len(PROMPTS))]
    for _, model in zip(range(7), itertools.cycle([other_model, third_model, tiny_model]), strict=False):
        await change(engine, model)
        await asyncio.sleep(0.05)
    ended.set()
    await asyncio.gather(*clients)
    assert set(given) == set(models)
