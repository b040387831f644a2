"""What is said of one run or two: paired differences, calibration, the documents whose score changed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rayllm.eval.report.runs import Key, Row

Z_95 = 1.959964  # of the normal distribution: 95 % lie within
NUM_BINS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Mean of (other - first) over the documents that both have, with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    num_documents: int

    @property
    def is_clear(self) -> bool:
        """The interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """`error`: the expected calibration error, the mean of |confidence - accuracy| over the documents' bins."""

    bins: Sequence[Bin]
    error: float
    num_documents: int


def paired_difference(first: Mapping[Key, Row], other: Mapping[Key, Row], metric: str) -> Difference | None:
    """None where fewer than two documents have the metric in both.

    Document by document, so what makes a document hard for both cancels; the interval is that of a mean (normal).
    """
    differences = [
        value - dict(first[key]["scores"])[metric]
        for key, row in other.items()
        if key in first
        and (value := dict(row["scores"]).get(metric)) is not None
        and metric in dict(first[key]["scores"])
    ]
    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (n - 1)
    half = Z_95 * math.sqrt(variance / n)
    return Difference(value=mean, low=mean - half, high=mean + half, num_documents=n)


def calibration(rows: Iterable[Row]) -> Calibration | None:
    """Of multiple choice: the likeliest choice's share of the probability of all choices, against how often it is
    right, in bins of equal width. None for other tasks."""
    pairs = [(confidence, dict(row["scores"])["acc"]) for row in rows if (confidence := _confidence(row)) is not None]
    if not pairs:
        return None
    binned: dict[int, list[tuple[float, float]]] = {}
    for confidence, right in pairs:
        binned.setdefault(min(int(confidence * NUM_BINS), NUM_BINS - 1), []).append((confidence, right))
    bins = [
        Bin(
            confidence=math.fsum(confidence for confidence, _ in members) / len(members),
            accuracy=math.fsum(right for _, right in members) / len(members),
            count=len(members),
        )
        for _, members in sorted(binned.items())
    ]
    error = math.fsum(each.count * abs(each.confidence - each.accuracy) for each in bins) / len(pairs)
    return Calibration(bins=bins, error=error, num_documents=len(pairs))


def _confidence(row: Row) -> float | None:
    logprobs = [response["logprob"] for response in row["responses"]]
    if "acc" not in dict(row["scores"]) or len(logprobs) < 2 or None in logprobs:
        return None
    best = max(logprobs)
    return 1 / math.fsum(math.exp(logprob - best) for logprob in logprobs)


def changed(first: Mapping[Key, Row], other: Mapping[Key, Row], metric: str) -> list[tuple[Row, Row]]:
    """The documents that score differently: those that got worse come first."""
    pairs = [(first[key], row) for key, row in other.items() if key in first]
    moved = [(change, old, new) for old, new in pairs if (change := _score(new, metric) - _score(old, metric))]
    moved.sort(key=lambda item: (item[0], item[1]["subject"], item[1]["index"]))
    return [(old, new) for _, old, new in moved]


def _score(row: Row, metric: str) -> float:
    return float(dict(row["scores"]).get(metric, 0.0))
