"""Columns of numbers to what an SVG draws: axes with round ticks, lines, what is shown where the mouse is.

Knows no metric by name and no HTML. Coordinates are those of the drawing, x to the right and y downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayllm.train.report.metrics import Column

WIDTH, HEIGHT = 300, 172
LEFT, RIGHT, TOP, BOTTOM = 40.0, 296.0, 8.0, 136.0  # of the plot inside
_MAX_POINTS = 240  # of a line; more are averaged
_MAX_DOTS = 40  # a line of so few points shows them
_SMOOTH_FROM = 100  # steps
_LOG_RANGE = 20.0  # largest over smallest value


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """`y` over `x`, of one length; NaN in either is no point."""

    label: str
    x: Column
    y: Column


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    place: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """`points`, `smooth`: of a polyline, x,y and so on; `smooth` empty where there is nothing to smooth."""

    label: str
    points: str
    smooth: str
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """Of the plot's whole height; `text` is told where the mouse is in it."""

    x: float
    width: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """`fades`: its dots are the stronger the later they are."""

    title: str
    last: str
    note: str
    x_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]
    strips: Sequence[Strip]
    fades: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places between `start` and `end` of a drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def of(cls, values: Column, start: float, end: float, *, log: bool = False) -> "Scale":
        """A range that holds all values, a little wider, and no empty one. `log` is for values far apart, all above
        0; others are shown as they are."""
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if log and low > 0 and high / low >= _LOG_RANGE:
            return cls(math.log10(low) - 0.05, math.log10(high) + 0.05, start, end, log=True)
        margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        # what cannot be negative is not shown as if it could
        return cls(max(low - margin, 0.0) if low >= 0 else low - margin, high + margin, start, end, log=False)

    @classmethod
    def exactly(cls, values: Column, start: float, end: float) -> "Scale":
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        return cls(low, high if high > low else low + 1, start, end, log=False)

    def __call__(self, values: Column) -> Column:
        share = ((np.log10(values) if self.log else values) - self.low) / (self.high - self.low)
        placed: Column = self.start + (self.end - self.start) * share
        return placed

    def ticks(self, unit: str = "", *, whole: bool = False) -> list[Tick]:
        values = self._log_values() if self.log else round_values(self.low, self.high)
        if whole:
            values = [value for value in values if value.is_integer()]
        return [Tick(place=float(self(np.array([value]))[0]), label=number(value, unit)) for value in values]

    def _log_values(self) -> list[float]:
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        fine = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        inside = [value for value in fine if self.low <= math.log10(value) <= self.high]
        whole = [value for value in inside if math.log10(value).is_integer()]
        return inside if len(inside) <= 5 else whole[:: 1 + len(whole) // 6]


def round_values(low: float, high: float, count: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from `low` to `high`; about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def number(value: float, unit: str = "") -> str:
    """As short as a label can be and still say three digits: 0.125, 3.2e-05, 12.5k, 1.2 GB."""
    if math.isnan(value):
        return "-"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and (unit or abs(value) >= 1e4):
            return f"{value / size:.3g} {letter}{unit}" if unit else f"{value / size:.3g}{letter}"
    # a sum of multiples of 0.1 may miss 0 by a hair
    text = f"{value:.4g}" if abs(value) >= 1 else f"{0.0 if abs(value) < 1e-12 else value:.3g}"
    return f"{text} {unit}".rstrip()


def running_mean(values: Column, window: int) -> Column:
    """Of each value and those before it, `window` in all, or as many as there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    mean: Column = (sums[ends] - sums[starts]) / (ends - starts)
    return mean


def smoothing_window(num_steps: int) -> int:
    """1: as it is."""
    return num_steps // 50 if num_steps >= _SMOOTH_FROM else 1


def over_steps(
    title: str, series: Sequence[Series], *, unit: str = "", log: bool = False, smooth: bool = True, note: str = ""
) -> Drawing:
    """Each of `series` is over steps, and has a point at least."""
    shown = [_points(one) for one in series]
    x = Scale.exactly(np.concatenate([one.x for one in shown]), LEFT, RIGHT)
    y = Scale.of(np.concatenate([one.y for one in shown]), BOTTOM, TOP, log=log)
    return Drawing(
        title=title,
        last=" / ".join(number(float(one.y[-1]), unit) for one in shown),
        note="; ".join(filter(None, [note, "logarithmic" if y.log else ""])),
        x_label="step",
        x_ticks=x.ticks(whole=True),
        y_ticks=y.ticks(unit),
        lines=[_line(one, x, y, smoothing_window(len(one.y)) if smooth else 1) for one in shown],
        strips=_strips(shown, x, unit),
    )


def against(title: str, series: Series, x_label: str, note: str) -> Drawing:
    """One column over another, joined in the order of steps: where it is strongest it ended."""
    shown = _points(series)
    window = smoothing_window(len(shown.y))
    mean = Series(label=shown.label, x=running_mean(shown.x, window), y=running_mean(shown.y, window))
    x, y = Scale.of(mean.x, LEFT, RIGHT), Scale.of(mean.y, BOTTOM, TOP)
    thinned = _averaged(mean, _MAX_POINTS // 3)
    return Drawing(
        title=title,
        last=f"{number(float(mean.y[-1]))} at {number(float(mean.x[-1]))}",
        note=note,
        x_label=x_label,
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        lines=[Line(label=shown.label, points=_path(thinned, x, y), smooth="", dots=_places(thinned, x, y))],
        strips=[],
        fades=True,
    )


def _points(series: Series) -> Series:
    there = ~(np.isnan(series.x) | np.isnan(series.y))
    return Series(label=series.label, x=series.x[there], y=series.y[there])


def _averaged(series: Series, count: int) -> Series:
    """At most `count` points, each a mean of neighbours; the last point is kept."""
    n = len(series.x)
    if n <= count:
        return series
    edges = np.linspace(0, n - 1, count).astype(int)
    sizes = np.diff(edges)
    x, y = (np.append(np.add.reduceat(values[:-1], edges[:-1]) / sizes, values[-1]) for values in (series.x, series.y))
    return Series(label=series.label, x=x, y=y)


def _line(series: Series, x: Scale, y: Scale, window: int) -> Line:
    thinned = _averaged(series, _MAX_POINTS)
    smooth = ""
    if window > 1:
        mean = Series(label=series.label, x=series.x, y=running_mean(series.y, window))
        smooth = _path(_averaged(mean, _MAX_POINTS), x, y)
    few = len(thinned.x) <= _MAX_DOTS
    return Line(
        label=series.label, points=_path(thinned, x, y), smooth=smooth, dots=_places(thinned, x, y) if few else []
    )


def _places(series: Series, x: Scale, y: Scale) -> list[tuple[float, float]]:
    return list(zip(x(series.x).tolist(), y(series.y).tolist(), strict=True))


def _path(series: Series, x: Scale, y: Scale) -> str:
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in _places(series, x, y))


def _strips(series: Sequence[Series], x: Scale, unit: str) -> list[Strip]:
    """One for each of the steps, or for some of them where these are many."""
    steps = np.unique(np.concatenate([one.x for one in series]))
    chosen = steps[np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS // 2)).astype(int)]
    places = x(chosen)
    middles = (places[1:] + places[:-1]) / 2
    starts, ends = np.append(LEFT, middles), np.append(middles, RIGHT)
    told = [dict(zip(one.x.tolist(), one.y.tolist(), strict=True)) for one in series]
    return [
        Strip(x=start, width=end - start, text=f"step {step:.0f}: {_told(series, told, step, unit)}")
        for step, start, end in zip(chosen.tolist(), starts.tolist(), ends.tolist(), strict=True)
    ]


def _told(series: Sequence[Series], told: Sequence[dict[float, float]], step: float, unit: str) -> str:
    values = [(one.label, values[step]) for one, values in zip(series, told, strict=True) if step in values]
    return ", ".join(f"{label} {number(value, unit)}" for label, value in values)
