"""What is said of one run or two: paired differences, calibration, the documents whose score changed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rayllm.eval.report.runs import Key, Row

Z_95 = 1.959964  # of the normal distribution: 95 % lie within
NUM_BINS = 10

# Of a perplexity: what its nats are divided by. A document's share of it is compared in nats, where errors add up.
NATS_PER = {"word_perplexity": "words", "byte_perplexity": "bytes", "token_perplexity": "tokens"}
_LEAST_NATS = 1e-4  # two computations of one model differ by less


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """other - first over the documents that both have, with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    num_documents: int

    @property
    def is_clear(self) -> bool:
        """The interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A sum over documents by another one; `stderr` as documents are drawn, None of a single one."""

    value: float
    stderr: float | None
    num_documents: int


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


def comparable(first: Mapping[Key, Row], other: Mapping[Key, Row]) -> dict[Key, Row]:
    """Those of `other` that are of the same documents as `first`'s: an index alone may be another one's in other data.
    Prompts tell where they have as many shots."""
    return {key: row for key, row in other.items() if key in first and _is_same(first[key], row)}


def _is_same(first: Row, other: Row) -> bool:
    parts = ["continuation"] if first["num_fewshot"] != other["num_fewshot"] else ["prompt", "continuation"]
    asked, asked_other = ([[each[part] for part in parts] for each in row["responses"]] for row in (first, other))
    return bool(first["target"] == other["target"]) and asked == asked_other


def paired_difference(first: Mapping[Key, Row], other: Mapping[Key, Row], metric: str) -> Difference | None:
    """Of the means. None where fewer than two documents have the metric in both.

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


def nats_per(rows: Iterable[Row], unit: str) -> Ratio | None:
    """Of all the texts together; None without texts."""
    scores = [dict(row["scores"]) for row in rows]
    if not scores or unit not in scores[0]:
        return None
    value, deviations = _linearized(scores, unit)
    return Ratio(value=value, stderr=_stderr(deviations), num_documents=len(scores))


def paired_nats(first: Mapping[Key, Row], other: Mapping[Key, Row], unit: str) -> Difference | None:
    """Of `nats_per`. None where fewer than two documents are in both.

    By the ratio estimator, whose error is that of a mean of the documents' deviations (its linear part); a document's
    deviations in both runs are subtracted first, so what makes it hard for both cancels.
    """
    pairs = [(dict(first[key]["scores"]), dict(row["scores"])) for key, row in other.items() if key in first]
    pairs = [(old, new) for old, new in pairs if unit in old and unit in new]
    if len(pairs) < 2:
        return None
    before, deviations_before = _linearized([old for old, _ in pairs], unit)
    after, deviations_after = _linearized([new for _, new in pairs], unit)
    stderr = _stderr([new - old for old, new in zip(deviations_before, deviations_after, strict=True)])
    assert stderr is not None
    value, half = after - before, Z_95 * stderr
    return Difference(value=value, low=value - half, high=value + half, num_documents=len(pairs))


def _linearized(scores: Sequence[Mapping[str, float]], unit: str) -> tuple[float, list[float]]:
    """The ratio, and what each document deviates from it: nats by the mean number of units."""
    units = max(math.fsum(score[unit] for score in scores), 1.0)
    ratio = -math.fsum(score["loglikelihood"] for score in scores) / units
    mean_units = units / len(scores)
    return ratio, [(-score["loglikelihood"] - ratio * score[unit]) / mean_units for score in scores]


def _stderr(deviations: Sequence[float]) -> float | None:
    n = len(deviations)
    if n < 2:
        return None
    mean = math.fsum(deviations) / n
    return math.sqrt(math.fsum((each - mean) ** 2 for each in deviations) / (n - 1) / n)


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
    """The documents that score differently: those that got worse, then those that got better, by how much."""
    least = _LEAST_NATS if metric in NATS_PER else 0.0
    pairs = [(first[key], row) for key, row in other.items() if key in first]
    moved = [(gain, old, new) for old, new in pairs if abs(gain := gained(old, new, metric)) > least]
    moved.sort(key=lambda item: (item[0] > 0, -abs(item[0]), item[1]["subject"], item[1]["index"]))
    return [(old, new) for _, old, new in moved]


def gained(old: Row, new: Row, metric: str) -> float:
    """Positive where the new score is the better one."""
    change = score(new, metric) - score(old, metric)
    return -change if metric in NATS_PER else change


def score(row: Row, metric: str) -> float:
    """One document's; of a perplexity its nats by unit, the fewer the better."""
    scores = dict(row["scores"])
    if (unit := NATS_PER.get(metric)) and unit in scores:
        return -float(scores["loglikelihood"]) / max(float(scores[unit]), 1.0)
    return float(scores.get(metric, 0.0))
