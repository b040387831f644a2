"""Many clients on one engine: streams, cancellation, deadlines, back-pressure, and an engine that dies."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.core.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelOutputError,
    RequestAbortedError,
)
from rayllm.core.types import FinishReason, Request, SamplingParams
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.build import Prepared, build_engine, prepare, start_local
from rayllm.engine.llm import LLM
from rayllm.engine.outputs import OutputDelta
from rayllm.scheduler.batch import StepResult

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True)


def config(model: Path, **scheduler: int) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(model)),
        cache=CacheConfig(num_blocks=100),
        scheduler=SchedulerConfig(**scheduler),
    )


def request(name: str, params: SamplingParams = SHORT, **options) -> Request:
    return Request(request_id=name, prompt_token_ids=tuple(name.encode() * 3), params=params, **options)


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine.start(config(tiny_model))
    yield engine
    await settled(engine)
    engine.check_integrity()
    await engine.close()


async def settled(engine: AsyncEngine) -> None:
    """Blocks are free within two steps of the last request's end."""
    steps = engine.stats().steps
    while (stats := engine.stats()).free_blocks != stats.total_blocks:
        assert stats.steps <= steps + 2, "blocks are still held two steps after the last request ended"
        await asyncio.sleep(0.001)


async def answer(engine: AsyncEngine, request: Request) -> tuple[list[int], str]:
    tokens: list[int] = []
    text = ""
    async for delta in engine.generate(request):
        tokens += delta.token_ids
        text += delta.text
    return tokens, text


async def test_concurrent_streams_equal_the_offline_engine(engine, tiny_model):
    requests = [request(f"request {i}") for i in range(12)]
    answers = await asyncio.gather(*(answer(engine, each) for each in requests))
    with LLM(str(tiny_model), cache=CacheConfig(num_blocks=100)) as llm:
        offline = llm.generate([list(each.prompt_token_ids) for each in requests], SHORT)
    assert answers == [(output.outputs[0].token_ids, output.outputs[0].text) for output in offline]


async def test_closing_the_stream_frees_the_blocks(engine):
    stream = engine.generate(request("gone", LONG))
    first: OutputDelta = await anext(stream)
    assert first.token_ids
    await stream.aclose()
    await settled(engine)
    assert engine.stats().running == 0


async def test_a_cancelled_reader_frees_the_blocks(engine):
    tasks = [asyncio.create_task(answer(engine, request(f"cancel {i}", LONG))) for i in range(8)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_abort_ends_the_stream_with_a_typed_error(engine):
    task = asyncio.create_task(answer(engine, request("abort me", LONG)))
    while not engine.stats().running:
        await asyncio.sleep(0.001)
    assert engine.abort("abort me")
    assert not engine.abort("abort me")
    with pytest.raises(RequestAbortedError, match="abort me"):
        await task


async def test_deadline(engine):
    with pytest.raises(DeadlineExceededError):
        await answer(engine, request("too late", LONG, deadline=time.monotonic() - 1))
    with pytest.raises(DeadlineExceededError):
        await answer(engine, request("runs out", LONG, deadline=time.monotonic() + 0.05))
    await answer(engine, request("in time", SHORT, deadline=time.monotonic() + 60))


async def test_a_live_request_id_is_refused(engine):
    stream = engine.generate(request("twice", LONG))
    await anext(stream)
    with pytest.raises(InvalidRequestError, match="request_id"):
        await answer(engine, request("twice"))
    assert (await anext(stream)).token_ids
    await stream.aclose()
    await answer(engine, request("twice"))


async def test_a_full_queue_refuses_at_once(tiny_model):
    engine = AsyncEngine.start(config(tiny_model, max_num_seqs=1, max_waiting_requests=2))
    running = asyncio.create_task(answer(engine, request("running", LONG)))
    while not engine.stats().running:
        await asyncio.sleep(0.001)
    waiting = [asyncio.create_task(answer(engine, request(f"waiting {i}"))) for i in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(CapacityError) as refusal:
        await answer(engine, request("one too many"))
    assert refusal.value.retry_after_s > 0
    assert len((await running)[0]) == 400
    await asyncio.gather(*waiting)
    await engine.close()


async def test_a_slow_reader_finds_the_pieces_merged(engine):
    stream = engine.generate(request("slow", LONG))
    await anext(stream)
    while engine.stats().running:
        await asyncio.sleep(0.01)
    rest = [delta async for delta in stream]
    # The last step's piece may still be on its way when the scheduler is done with the request.
    assert len(rest) <= 2
    assert sum(len(delta.token_ids) for delta in rest) == 399
    assert rest[-1].finish_reason is FinishReason.LENGTH


async def test_drain_finishes_the_running_and_refuses_the_new(tiny_model):
    engine = AsyncEngine.start(config(tiny_model))
    running = asyncio.create_task(answer(engine, request("running", LONG)))
    while not engine.stats().running:
        await asyncio.sleep(0.001)
    closing = asyncio.create_task(engine.close(drain_timeout_s=60))
    await asyncio.sleep(0)
    with pytest.raises(EngineUnavailableError, match="shutting down"):
        await answer(engine, request("late"))
    assert len((await running)[0]) == 400
    await closing


async def test_closing_without_a_drain_ends_the_streams(tiny_model):
    engine = AsyncEngine.start(config(tiny_model))
    running = asyncio.create_task(answer(engine, request("running", LONG)))
    while not engine.stats().running:
        await asyncio.sleep(0.001)
    await engine.close()
    with pytest.raises(EngineUnavailableError, match="shutting down"):
        await running


@pytest.mark.parametrize("error", [EngineUnavailableError("shard 1 is lost"), ZeroDivisionError("a bug")])
async def test_an_engine_that_dies_ends_every_stream(tiny_model, error):
    def start(prepared: Prepared):
        executor, num_blocks = start_local(prepared)
        collect = executor.collect
        calls = iter(range(10))

        def failing() -> StepResult:
            if next(calls) == 5:
                raise error
            return collect()

        executor.collect = failing
        return executor, num_blocks

    engine = AsyncEngine.start(config(tiny_model), start)
    results = await asyncio.gather(
        *(answer(engine, request(f"doomed {i}", LONG)) for i in range(4)), return_exceptions=True
    )
    assert all(isinstance(result, EngineUnavailableError) for result in results)
    assert "a bug" not in str(results[0])
    with pytest.raises(EngineUnavailableError):
        engine.check_health()
    with pytest.raises(EngineUnavailableError):
        await answer(engine, request("afterwards"))
    await engine.close()


async def test_a_request_whose_numbers_are_broken_fails_alone(tiny_model):
    def start(prepared: Prepared):
        """As memory that has lost a bit: no checkpoint with such a weight is loaded."""
        executor, num_blocks = start_local(prepared)
        with torch.inference_mode():
            executor._runner._served.model.embed_tokens.weight[ord("z")] = torch.nan
        return executor, num_blocks

    engine = AsyncEngine(build_engine(prepare(config(tiny_model)), start))
    requests = [request("well 1"), request("zzz"), request("well 2")]
    results = await asyncio.gather(*(answer(engine, each) for each in requests), return_exceptions=True)
    assert isinstance(results[1], ModelOutputError)
    assert [len(results[i][0]) for i in (0, 2)] == [20, 20]
    await settled(engine)
    engine.check_integrity()
    engine.check_health()
    await engine.close()


async def test_health_fails_when_a_step_is_overdue(tiny_model):
    def start(prepared: Prepared):
        executor, num_blocks = start_local(prepared)
        collect = executor.collect

        def slow() -> StepResult:
            time.sleep(0.5)
            return collect()

        executor.collect = slow
        return executor, num_blocks

    engine = AsyncEngine(build_engine(prepare(config(tiny_model)), start), stall_timeout_s=0.2)
    engine.check_health()
    task = asyncio.create_task(answer(engine, request("slow", SamplingParams(max_tokens=1, ignore_eos=True))))
    await asyncio.sleep(0.4)
    with pytest.raises(EngineUnavailableError, match="no step"):
        engine.check_health()
    await task
    engine.check_health()
    await engine.close()
