"""What goes into a benchmark and what comes out: prompts and percentiles."""

import random
import statistics
from collections.abc import Sequence


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default. `sorted_values` ascend and are not empty."""
    position = (len(sorted_values) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(sorted_values) - 1)
    return sorted_values[below] + (sorted_values[above] - sorted_values[below]) * (position - below)


def latency_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """None where nothing was measured."""
    if not seconds:
        return None
    ascending = sorted(1000 * value for value in seconds)
    return {
        "mean": statistics.fmean(ascending),
        "p50": percentile(ascending, 50),
        "p90": percentile(ascending, 90),
        "p99": percentile(ascending, 99),
        "max": ascending[-1],
    }


def random_prompts(count: int, length: int, *, seed: int) -> list[list[int]]:
    """Token ids that every vocabulary has; no two prompts share a prefix, so that no prefix cache helps."""
    generator = random.Random(seed)
    return [[generator.randrange(256) for _ in range(length)] for _ in range(count)]
