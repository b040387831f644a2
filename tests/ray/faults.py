"""Shards that are killed or stopped under streams, and what a fault may leave behind."""

import asyncio
import contextlib
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import ray

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.core.types import Request, SamplingParams
from rayllm.engine.async_engine import AsyncEngine
from tests.ray.processes import descendants, wait_gone

NUM_STREAMS = 16

Answers = list[tuple[list[int], str]]


def config_of(
    model: Path,
    tensor: int = 1,
    pipeline: int = 1,
    *,
    max_num_seqs: int = 12,
    max_waiting_requests: int = 64,
    **parallel: float,
) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(model), dtype="float32", device="cpu"),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, **parallel),
        cache=CacheConfig(num_blocks=256, block_size=4),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=64, max_num_seqs=max_num_seqs, max_waiting_requests=max_waiting_requests
        ),
    )


def requests(prefix: str = "") -> list[Request]:
    """Greedy and sampled in turn, prompts of odd lengths that share a prefix, more of them than run at once."""
    return [
        Request(
            request_id=f"{prefix}{i}",
            prompt_token_ids=tuple(range(10, 31)) + tuple((7 * i + k) % 250 for k in range(1 + 5 * i)),
            params=SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=60, ignore_eos=True),
        )
        for i in range(NUM_STREAMS)
    ]


async def answer(engine: AsyncEngine, request: Request) -> tuple[list[int], str]:
    tokens: list[int] = []
    text = ""
    async for delta in engine.generate(request):
        tokens += delta.token_ids
        text += delta.text
    return tokens, text


async def answers(engine: AsyncEngine, prefix: str = "") -> Answers:
    return list(await asyncio.gather(*(answer(engine, request) for request in requests(prefix))))


def shard_pids(driver: int | None = None) -> set[int]:
    """Of the shards below this process or another, each from the moment that its actor exists."""
    found = set()
    for pid in descendants(driver or os.getpid()):
        with contextlib.suppress(OSError):
            if b"ray::Shard" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


@contextlib.contextmanager
def noticing() -> Iterator[list[float]]:
    """When each loss was noticed, on the monotonic clock."""
    times: list[float] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            times.append(time.monotonic())

    handler = Handler()
    logger = logging.getLogger("rayllm_cluster.epoch")
    logger.addHandler(handler)
    try:
        yield times
    finally:
        logger.removeHandler(handler)


@dataclass(frozen=True)
class Footprint:
    """What this process and its Ray hold on to."""

    shards: int
    placement_groups: int
    sockets: int
    files: int
    watchers: int
    shared_memory: int
    blocks: int

    @classmethod
    def of(cls, engine: AsyncEngine) -> "Footprint":
        files = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                files.append(os.readlink(f"/proc/self/fd/{name}"))
        stats = engine.stats()
        groups = ray.util.placement_group_table().values()
        return cls(
            shards=len(shard_pids()),
            placement_groups=sum(group["state"] != "REMOVED" for group in groups),
            sockets=sum(name.startswith("socket:") for name in files),
            files=sum(not name.startswith("socket:") for name in files),
            watchers=sum(thread.name == "shard-watcher" for thread in threading.enumerate()),
            shared_memory=len(os.listdir("/dev/shm")),
            blocks=stats.total_blocks - stats.free_blocks,
        )

    def leaks(self, before: "Footprint") -> list[str]:
        pairs = ((field.name, getattr(before, field.name), getattr(self, field.name)) for field in fields(self))
        return [f"{name} {was} -> {now}" for name, was, now in pairs if now > was]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`detection_s`: from the signal to the moment that the loss was noticed."""

    detection_s: float
    recovery_s: float
    leaks: list[str]


async def strike(
    engine: AsyncEngine, number: signal.Signals, rng: random.Random, *, expected: Answers, within_s: float
) -> Trial:
    """One shard gets a signal at a random moment of `within_s` while the streams run, and every stream ends as if it
    had not."""
    before, shards = Footprint.of(engine), shard_pids()
    recoveries = engine.stats().recoveries
    with noticing() as noticed:
        streams = asyncio.create_task(answers(engine, f"{recoveries}-"))
        await asyncio.sleep(rng.uniform(0.0, within_s))
        struck = time.monotonic()
        os.kill(rng.choice(sorted(shards)), number)
        assert await streams == expected
        while engine.stats().recoveries == recoveries:  # it was struck when the streams had ended already
            await asyncio.sleep(0.01)
    stats = engine.stats()
    assert (stats.recoveries, len(noticed)) == (recoveries + 1, 1)
    detection_s = noticed[0] - struck
    assert stats.last_detection_s > detection_s - 0.1, "it is stated as a bound"
    engine.check_health()
    engine.check_integrity()
    assert wait_gone(shards, 0) == set()
    return Trial(detection_s=detection_s, recovery_s=stats.last_recovery_s, leaks=Footprint.of(engine).leaks(before))
