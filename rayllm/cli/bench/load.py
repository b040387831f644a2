"""A closed loop of clients: each sends its next request when its last one is answered.

Knows nothing of how a request travels; a `Transport` does.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from rayllm.cli.bench.statistics import latency_ms
from rayllm.core.errors import RayLLMError

Clock = Callable[[], float]


@dataclass(slots=True)
class Record:
    """One request as its client saw it; times are the clock's."""

    clock: Clock
    started: float
    arrivals: list[float] = field(default_factory=list)  # of the pieces, each with at least one token
    output_tokens: int = 0
    finished: float | None = None
    error: str | None = None

    def piece(self, num_tokens: int) -> None:
        if num_tokens:
            self.arrivals.append(self.clock())
            self.output_tokens += num_tokens


class Transport(Protocol):
    async def send(self, prompt_token_ids: list[int], output_len: int, record: Record) -> None:
        """Stream exactly `output_len` tokens, calling `record.piece` as they arrive. Raises RayLLMError."""
        ...

    async def close(self) -> None: ...


async def run_load(
    transport: Transport,
    prompts: Iterable[list[int]],
    *,
    output_len: int,
    concurrency: int,
    on_done: Callable[[int], None],
    clock: Clock = time.perf_counter,
) -> tuple[list[Record], float]:
    """The records and how long all of it took, in seconds. `on_done(1)` is called for each request."""
    waiting = iter(prompts)
    records: list[Record] = []

    async def client() -> None:
        for prompt in waiting:
            record = Record(clock=clock, started=clock())
            records.append(record)
            try:
                await transport.send(prompt, output_len, record)
            except RayLLMError as error:
                record.error = str(error)
            if record.error is None and record.output_tokens != output_len:
                record.error = f"{record.output_tokens} tokens came instead of {output_len}"
            record.finished = clock()
            on_done(1)

    started = clock()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return records, clock() - started


def summarize(records: list[Record], duration_s: float, *, input_len: int) -> dict[str, object]:
    """Latencies are those of the requests without an error; throughput counts their tokens only."""
    good = [record for record in records if record.error is None]
    output_tokens = sum(record.output_tokens for record in good)
    pieces = sum(len(record.arrivals) for record in good)
    return {
        "requests": len(records),
        "errors": len(records) - len(good),
        "error_messages": dict(Counter(record.error for record in records if record.error is not None)),
        "duration_s": duration_s,
        "requests_per_s": len(good) / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "total_tokens_per_s": (output_tokens + input_len * len(good)) / duration_s,
        "tokens_per_piece": output_tokens / pieces if pieces else None,
        "ttft_ms": latency_ms([record.arrivals[0] - record.started for record in good]),
        "inter_token_ms": latency_ms([gap for record in good for gap in _gaps(record.arrivals)]),
        "end_to_end_ms": latency_ms(
            [record.finished - record.started for record in good if record.finished is not None]
        ),
    }


def _gaps(arrivals: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(arrivals)]
