"""Throughput of an engine that is handed all its work at once, prefill and decode told apart.

Each repeat answers fresh prompts twice: once for one token, which is the prefill, and fresh ones again for all the
tokens. What the second takes longer is the decode of `output_len - 1` tokens for each request.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rayllm.cli.bench.statistics import random_prompts

# Answers every prompt with exactly so many tokens.
Run = Callable[[list[list[int]], int], None]
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    requests: int
    input_len: int
    output_len: int  # at least 2

    def prompts(self) -> Iterator[list[list[int]]]:
        """Ever new ones, the same for every engine."""
        seed = 0
        while True:
            yield random_prompts(self.requests, self.input_len, seed=seed)
            seed += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    prefill_s: float
    total_s: float


def time_once(run: Run, workload: Workload, prompts: Iterator[list[list[int]]], clock: Clock) -> Timing:
    durations = []
    for output_len in (1, workload.output_len):
        batch = next(prompts)
        started = clock()
        run(batch, output_len)
        durations.append(clock() - started)
    return Timing(prefill_s=durations[0], total_s=durations[1])


def compare(
    engines: dict[str, Run],
    workload: Workload,
    *,
    repeats: int,
    on_done: Callable[[int], None],
    clock: Clock = time.perf_counter,
) -> dict[str, list[Timing]]:
    """Timings of each engine, taken in turns so that a noisy machine is equally noisy for all.

    A first round warms everything up and is not counted.
    """
    streams = {name: workload.prompts() for name in engines}
    timings: dict[str, list[Timing]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, run in engines.items():
            timing = time_once(run, workload, streams[name], clock)
            if repeat > 0:
                timings[name].append(timing)
            on_done(1)
    return timings


def speeds(timings: list[Timing], workload: Workload) -> dict[str, Any]:
    """Medians over the repeats, in tokens per second over all requests together."""
    prefilled = workload.requests * workload.input_len
    decoded = workload.requests * (workload.output_len - 1)
    runs = [
        {
            "prefill_tokens_per_s": prefilled / timing.prefill_s,
            # A decode that is lost in the noise of two prefills has no speed to speak of.
            "decode_tokens_per_s": decoded / max(timing.total_s - timing.prefill_s, 1e-9),
            "total_tokens_per_s": workload.requests * (workload.input_len + workload.output_len) / timing.total_s,
        }
        for timing in timings
    ]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {**medians, "runs": runs}
