"""One HTML page that compares runs: it needs no other file and no network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rayllm.core.page import render_page, write_page
from rayllm.eval.report.runs import Key, Row, Run, differing_settings, read_runs, task_names
from rayllm.eval.report.statistics import (
    NATS_PER,
    Calibration,
    Difference,
    calibration,
    changed,
    comparable,
    gained,
    nats_per,
    paired_difference,
    paired_nats,
    score,
)

MAX_CHANGED = 40  # samples shown for a task and a pair of runs
MAX_CHARS = 3000  # of one text

Rows = Mapping[Key, Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    value: float
    stderr: float | None
    num_documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One metric in every run, and each run's difference from the first."""

    metric: str
    figures: Sequence[Figure | None]
    differences: Sequence[Difference | None]
    less_is_better: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    name: str
    before: float
    after: float
    is_better: bool
    target: str
    answers: tuple[str, str] | None  # None: a text whose likelihood was asked for
    prompt: str
    texts: tuple[str, str] | None  # None: choices
    choices: Sequence[tuple[str, float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """`samples`: the first of the `num_worse` + `num_better` documents whose score is another than the first run's."""

    run: Run
    num_worse: int
    num_better: int
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    task: str
    version: str
    notes: Sequence[str]
    lines: Sequence[Line]
    bar_metric: str
    bars: Mapping[str, Sequence[Figure | None]]  # by part of the task
    bar_end: float
    calibrations: Sequence[Calibration | None]
    changes: Sequence[Changes]


def write_report(directories: Sequence[Path], path: Path) -> None:
    """Raises ConfigError or DataError for folders that hold no finished runs."""
    write_page(render(read_runs(directories)), path)


def render(runs: Sequence[Run]) -> str:
    sections = [_section(task, runs) for task in task_names(runs)]
    filters = {"figure": _figure, "signed": _signed, "error": _error}
    settings = differing_settings(runs)
    return render_page("rayllm.eval.report", filters, runs=runs, settings=settings, sections=sections)


def _section(task: str, runs: Sequence[Run]) -> Section:
    results = [run.tasks.get(task) for run in runs]
    present = [result for result in results if result is not None]
    metrics = list(dict.fromkeys(chain.from_iterable(result["metrics"] for result in present)))
    parts = list(dict.fromkeys(chain.from_iterable(result["groups"] for result in present)))
    bars = {part: [_of(result and result["groups"].get(part), metrics[0]) for result in results] for part in parts}
    values = [figure.value for figure in chain.from_iterable(bars.values()) if figure is not None]
    rows = [list(run.rows(task).values()) for run in runs]
    first, *others = (run.rows(task) for run in runs)
    others = [comparable(first, other) for other in others]
    return Section(
        task=task,
        version=present[0]["version"],
        notes=_notes(runs, task, others),
        lines=[
            *(_line(metric, results, first, others) for metric in metrics),
            *(_nats_line(NATS_PER[metric], rows, first, others) for metric in metrics if metric in NATS_PER),
        ],
        bar_metric=metrics[0],
        bars=bars,
        bar_end=1.0 if max(values, default=0.0) <= 1 else max(values),
        calibrations=[calibration(each) for each in rows],
        changes=[
            _changes(metrics[0], first, other, run)
            for run, other in zip(runs[1:], others, strict=True)
            if task in run.tasks
        ],
    )


def _notes(runs: Sequence[Run], task: str, compared: Sequence[Rows]) -> list[str]:
    """What makes figures of a section hard to compare, or how they came about."""
    results = {run.letter: run.tasks[task] for run in runs if task in run.tasks}
    notes = []
    first = runs[0].rows(task)
    for run, rows in zip(runs[1:], compared, strict=True):
        if others := sum(key in first for key in run.rows(task)) - len(rows):
            notes.append(
                f"{others} of the documents of {run.letter} have other texts than {runs[0].letter}'s of the same "
                "number, and are not compared."
            )
    for run in runs:
        if task in run.tasks and not run.rows(task):
            notes.append(f"{run.letter}'s folder holds no samples any more, so nothing is compared with it.")
    for what, name in (("version", "Task version"), ("num_fewshot", "Shots"), ("num_documents", "Documents")):
        if len({str(result[what]) for result in results.values()}) > 1:
            each = ", ".join(f"{letter} {result[what]}" for letter, result in results.items())
            notes.append(f"{name} differ: {each}. Only the paired differences compare like with like.")
    for key in dict.fromkeys(chain.from_iterable(result.get("environment", {}) for result in results.values())):
        each = ", ".join(
            f"{letter} {result.get('environment', {}).get(key, '?')}" for letter, result in results.items()
        )
        notes.append(f"{key.capitalize()}: {each}.")
    return notes


def _line(metric: str, results: Sequence[Mapping[str, Any] | None], first: Rows, others: Sequence[Rows]) -> Line:
    return Line(
        metric=metric,
        figures=[_of(result, metric) for result in results],
        differences=[None, *(paired_difference(first, other, metric) for other in others)],
    )


def _nats_line(unit: str, rows: Sequence[Sequence[Row]], first: Rows, others: Sequence[Rows]) -> Line:
    """Perplexities are compared by their logarithms."""
    ratios = [nats_per(each, unit) for each in rows]
    return Line(
        metric=f"nats per {unit.removesuffix('s')}",
        figures=[
            None if ratio is None else Figure(value=ratio.value, stderr=ratio.stderr, num_documents=ratio.num_documents)
            for ratio in ratios
        ],
        differences=[None, *(paired_nats(first, other, unit) for other in others)],
        less_is_better=True,
    )


def _of(part: Mapping[str, Any] | None, metric: str) -> Figure | None:
    if part is None or metric not in part["metrics"]:
        return None
    found = part["metrics"][metric]
    value = math.nan if found["value"] is None else found["value"]
    return Figure(value=value, stderr=found["stderr"], num_documents=part["num_documents"])


def _changes(metric: str, first: Rows, other: Rows, run: Run) -> Changes:
    pairs = changed(first, other, metric)
    samples = [_sample(old, new, metric) for old, new in pairs]
    worse = [sample for sample in samples if not sample.is_better]
    better = [sample for sample in samples if sample.is_better]
    shown = [*worse[: MAX_CHANGED // 2], *better[: MAX_CHANGED // 2]]
    return Changes(run=run, num_worse=len(worse), num_better=len(better), samples=shown)


def _sample(old: Row, new: Row, metric: str) -> Sample:
    responses = list(zip(old["responses"], new["responses"], strict=False))
    generated = bool(responses) and responses[0][0]["text"] is not None
    subject = f"{old['subject']} " if old["subject"] else ""
    return Sample(
        name=f"{subject}{old['index']}",
        before=score(old, metric),
        after=score(new, metric),
        is_better=gained(old, new, metric) > 0,
        target=_shortened(old["target"]),
        answers=None
        if metric in NATS_PER
        else (_shortened(old["extracted"] or ""), _shortened(new["extracted"] or "")),
        prompt=_shortened(responses[0][0]["prompt"] if responses else "", end=True),
        texts=(_shortened(responses[0][0]["text"]), _shortened(responses[0][1]["text"] or "")) if generated else None,
        choices=[] if generated else [(a["continuation"], a["logprob"], b["logprob"]) for a, b in responses],
    )


def _shortened(text: str, *, end: bool = False) -> str:
    """The end of a prompt is the question; the beginning of an answer is the answer."""
    if len(text) <= MAX_CHARS:
        return text
    return f"[...] {text[-MAX_CHARS:]}" if end else f"{text[:MAX_CHARS]} [...]"


def _figure(value: float) -> str:
    """Shares in percent with two decimals would hide nothing; other figures with four significant digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 10 else f"{value:+.5g}"


def _error(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"± {_figure(value)}"
