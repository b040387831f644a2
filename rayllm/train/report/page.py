"""One HTML page that shows a training run: it needs no other file and no network.

Whatever number a recipe tells of a step is shown; those that are known here have a name, a unit and a place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayllm.core.page import render_page, write_page
from rayllm.train.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Drawing,
    Series,
    against,
    number,
    over_steps,
    smoothing_window,
)
from rayllm.train.report.metrics import Column, Metrics, read_columns
from rayllm.train.run_info import RunInfo, read_run_info
from rayllm.train.samples import read_samples
from rayllm.train.saved import SavedRun

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """`columns`: by name in the metrics, each with what it is called here. `log` where values may lie far apart;
    `smooth` where they are noisy."""

    title: str
    columns: Mapping[str, str]
    unit: str = ""
    log: bool = False
    smooth: bool = True
    note: str = ""


GROUPS: Mapping[str, Sequence[Chart]] = {
    "Learning": (
        Chart(title="Loss", columns={"loss": "loss"}, log=True),
        Chart(title="Learning rate", columns={"learning_rate": "learning rate"}, smooth=False),
        Chart(title="Gradient norm", columns={"grad_norm": "norm"}, log=True, note="before clipping"),
    ),
    "Preferences": (
        Chart(title="Accuracy", columns={"accuracy": "accuracy"}, note="share of pairs with a margin above 0"),
        Chart(title="Margin", columns={"margin": "margin"}, note="chosen less rejected reward"),
        Chart(title="Rewards", columns={"chosen_reward": "chosen", "rejected_reward": "rejected"}),
    ),
    "Reinforcement": (
        Chart(title="Reward", columns={"reward": "reward"}),
        Chart(title="KL to the reference", columns={"kl": "KL"}),
        Chart(title="Length of answers", columns={"answer_tokens": "length"}, note="tokens"),
        Chart(title="Entropy", columns={"entropy": "entropy"}, note="of the policy, nats a token"),
        Chart(title="Policy loss", columns={"policy_loss": "loss"}),
        Chart(title="Value loss", columns={"value_loss": "loss"}, log=True),
        Chart(title="Clipped", columns={"clip_fraction": "clipped"}, note="share of tokens whose ratio is clipped"),
        Chart(title="KL of engine and training", columns={"gap_kl": "KL"}, log=True, note="same weights, same tokens"),
    ),
    "Speed and memory": (
        Chart(title="Throughput", columns={"tokens_per_second": "tokens/s"}, note="tokens a second, padding too"),
        Chart(title="Model FLOP/s", columns={"flops_per_second": "speed"}, note="of all ranks"),
        Chart(title="MFU", columns={"mfu": "share"}, note="share of the peak that the cards' data sheet states"),
        Chart(
            title="Share of matmul rate",
            columns={"matmul_share": "share"},
            note="of the rate that matrix products reached as the run began",
        ),
        Chart(title="Memory", columns={"memory_bytes": "memory"}, unit="B", smooth=False, note="most that rank 0 held"),
        Chart(title="Targets or pairs", columns={"count": "count"}, note="that the loss is a mean over"),
    ),
}  # fmt: skip
_NO_MEASURES = {"steps", "pid", "seconds"}
_RECIPE_TABLES = {"dpo", "ppo"}  # of the configuration: of use to the recipe of that name alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measure over the whole run."""

    name: str
    first: str
    last: str
    recent: str
    lowest: str
    lowest_step: int
    highest: str
    highest_step: int


def write_report(run: Path, path: Path) -> None:
    """Raises DataError where `run` is none, has no metrics yet, or these cannot be read."""
    write_page(render(run), path)


def render(run: Path) -> str:
    info, metrics = read_run_info(run), read_columns(run)
    groups = dict(_groups(metrics))
    checkpoints = [saved.directory.name for saved in SavedRun(run).all()]
    return render_page(
        "rayllm.train.report",
        {},
        run=run.resolve().name,
        summary=_summary(info, metrics),
        groups=groups,
        window=smoothing_window(len(metrics.steps)),
        size=(WIDTH, HEIGHT),
        plot={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        figures=[_figure(chart, name, metrics) for charts in _charts(metrics).values() for chart, name in charts],
        settings=_settings(info),
        checkpoints=checkpoints,
        samples=read_samples(run),
    )


def _charts(metrics: Metrics) -> dict[str, list[tuple[Chart, str]]]:
    """By group, every measure there is with the chart that it is in."""
    known = {name for charts in GROUPS.values() for chart in charts for name in chart.columns}
    others = [name for name in metrics.columns if name not in known | _NO_MEASURES]
    plain = [Chart(title=_words(name), columns={name: _words(name)}) for name in others]
    return {
        group: [(chart, name) for chart in charts for name in chart.columns if name in metrics.columns]
        for group, charts in {**GROUPS, "Other measures": plain}.items()
    }


def _groups(metrics: Metrics) -> Sequence[tuple[str, Sequence[Drawing]]]:
    drawn = []
    for group, members in _charts(metrics).items():
        charts = {chart.title: chart for chart, _ in members}.values()
        drawings = [_drawing(chart, metrics) for chart in charts]
        if {"reward", "kl"} <= {name for _, name in members}:
            frontier = Series(label="reward", x=metrics.columns["kl"], y=metrics.columns["reward"])
            drawings.insert(0, against("Reward against KL", frontier, "KL to the reference", "from pale to strong"))
        if drawings:
            drawn.append((group, drawings))
    return drawn


def _drawing(chart: Chart, metrics: Metrics) -> Drawing:
    series = [
        Series(label=label, x=metrics.steps, y=metrics.columns[name])
        for name, label in chart.columns.items()
        if name in metrics.columns
    ]
    return over_steps(chart.title, series, unit=chart.unit, log=chart.log, smooth=chart.smooth, note=chart.note)


def _figure(chart: Chart, name: str, metrics: Metrics) -> Figure:
    there = ~np.isnan(metrics.columns[name])
    steps, values = metrics.steps[there], metrics.columns[name][there]
    lowest, highest = int(values.argmin()), int(values.argmax())

    def said(value: float) -> str:
        return number(float(value), chart.unit)

    several = len(chart.columns) > 1
    return Figure(
        name=f"{chart.title}, {chart.columns[name]}" if several else chart.title,
        first=said(values[0]),
        last=said(values[-1]),
        recent=said(values[-max(1, len(values) // 10) :].mean()),
        lowest=said(values[lowest]),
        lowest_step=int(steps[lowest]),
        highest=said(values[highest]),
        highest_step=int(steps[highest]),
    )


def _summary(info: RunInfo, metrics: Metrics) -> dict[str, str]:
    done, steps = int(metrics.steps[-1]), int(_last(metrics, "steps"))
    seconds = metrics.columns.get("seconds", np.zeros(1))
    tokens = np.nansum(seconds * metrics.columns.get("tokens_per_second", np.zeros(1)))
    return {
        "recipe": info.recipe,
        "start": str(info.config.get("model", {}).get("start", "?")),
        "steps": f"{done:,} of {steps:,}" + ("" if done >= steps else ", not finished"),
        "tokens": number(float(tokens)),
        "time in steps": _duration(float(np.nansum(seconds))),
    }


def _last(metrics: Metrics, name: str) -> float:
    column: Column = metrics.columns.get(name, metrics.steps)
    return float(column[~np.isnan(column)][-1])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _settings(info: RunInfo) -> dict[str, dict[str, Any]]:
    """By table of the configuration; what lies in none comes first."""
    tables = {
        name: dict(value)
        for name, value in info.config.items()
        if isinstance(value, Mapping) and (name == info.recipe or name not in _RECIPE_TABLES)
    }
    return {"": {k: v for k, v in info.config.items() if not isinstance(v, Mapping)}, **tables}


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
