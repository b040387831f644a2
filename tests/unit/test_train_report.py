"""The page of a run: what it draws is what was measured, it stands alone, and what is missing is named."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayllm.cli.main import main
from rayllm.core.errors import DataError
from rayllm.train.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from rayllm.train.progress import METRICS, ProgressWriter, read_metrics
from rayllm.train.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Drawing,
    Scale,
    Series,
    against,
    number,
    over_steps,
    round_values,
    running_mean,
)
from rayllm.train.report.page import render, write_report
from rayllm.train.run_info import write_run_info
from tests import train_ranks
from tests.html_page import parse
from tests.packed_rows import seven_pairs
from tests.progress_rows import progress
from tests.ranks import Ranks

HOSTILE = "<script>alert(1)</script>"
PPO = ("reward", "kl", "entropy", "answer_tokens", "policy_loss", "value_loss", "clip_fraction", "gap_kl")
TITLES = {
    "reward": "Reward",
    "kl": "KL to the reference",
    "entropy": "Entropy",
    "answer_tokens": "Length of answers",
    "policy_loss": "Policy loss",
    "value_loss": "Value loss",
    "clip_fraction": "Clipped",
    "gap_kl": "KL of engine and training",
}


def config_of(run: Path, steps: int, **model: Any) -> TrainConfig:
    return TrainConfig(
        run=str(run),
        model=ModelConfig(**{"start": f"start {HOSTILE}", **model}),
        data=DataConfig(path="packed"),
        batch=BatchConfig(sequence_length=32, tokens=128),
        optimizer=OptimizerConfig(learning_rate=3.25e-4),
        schedule=ScheduleConfig(steps=steps),
    )


def write_run(run: Path, recipe: str, measures: Mapping[str, np.ndarray], losses: np.ndarray) -> Path:
    write_run_info(config_of(run, len(losses)), recipe)
    writer = ProgressWriter(run, 0)
    for step, loss in enumerate(losses.tolist(), 1):
        told = {name: float(values[step - 1]) for name, values in measures.items()}
        writer.add(progress(step, loss, steps=len(losses), **told))
    writer.flush()
    return run


def random_column(seed: int, n: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 2.5, n)


def drawn_values(drawing: Drawing, places: str, ticks: list[tuple[float, float]]) -> np.ndarray:
    """What the heights of a polyline mean by the labels of the axis: two of them fix a line."""
    (place_a, value_a), (place_b, value_b) = ticks[0], ticks[-1]
    y = np.array([float(point.split(",")[1]) for point in places.split()])
    return value_a + (y - place_a) * (value_b - value_a) / (place_b - place_a)


def test_a_line_is_where_the_axis_says() -> None:
    values = random_column(0, 30)
    drawing = over_steps("loss", [Series(label="loss", x=np.arange(1.0, 31.0), y=values)])
    [line] = drawing.lines
    ticks = [(tick.place, float(tick.label)) for tick in drawing.y_ticks]
    assert len(ticks) >= 2
    height = abs(ticks[0][1] - ticks[-1][1]) / abs(ticks[0][0] - ticks[-1][0])
    assert drawn_values(drawing, line.points, ticks) == pytest.approx(values, abs=0.06 * height)  # one decimal is kept
    assert line.smooth == ""
    assert len(line.dots) == 30
    x = [float(point.split(",")[0]) for point in line.points.split()]
    assert (x[0], x[-1]) == (LEFT, RIGHT)
    assert all(TOP <= float(point.split(",")[1]) <= BOTTOM for point in line.points.split())
    assert [strip.text for strip in drawing.strips[:1]] == [f"step 1: loss {number(values[0])}"]
    assert sum(strip.width for strip in drawing.strips) == pytest.approx(RIGHT - LEFT)


def test_a_logarithmic_axis_is_one() -> None:
    values = np.geomspace(1e-5, 10.0, 25)
    drawing = over_steps("gap", [Series(label="gap", x=np.arange(1.0, 26.0), y=values)], log=True)
    ticks = [(tick.place, np.log10(float(tick.label))) for tick in drawing.y_ticks]
    found = drawn_values(drawing, drawing.lines[0].points, ticks)
    assert found == pytest.approx(np.log10(values), abs=0.01)
    assert "logarithmic" in drawing.note
    with_zero = over_steps("gap", [Series(label="gap", x=np.arange(2.0), y=np.array([0.0, 5.0]))], log=True)
    assert "logarithmic" not in with_zero.note


def test_many_points_are_averaged_and_the_mean_is_kept() -> None:
    values = random_column(1, 100_003)
    drawing = over_steps("loss", [Series(label="loss", x=np.arange(100_003.0), y=values)])
    [line] = drawing.lines
    ticks = [(tick.place, float(tick.label)) for tick in drawing.y_ticks]
    found = drawn_values(drawing, line.points, ticks)
    assert len(found) == 240
    assert found[:-1].mean() == pytest.approx(values.mean(), abs=0.02)
    assert len(line.smooth.split()) == 240
    assert line.dots == []


def test_running_mean_is_that_of_numpy() -> None:
    values = random_column(2, 50)
    expected = [values[max(0, n - 6) : n + 1].mean() for n in range(50)]
    assert running_mean(values, 7) == pytest.approx(np.array(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 7.7), (1e-9, 2e-9), (999.9, 1000.1), (-1e6, 5e8), (0.0, 1e-30)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    values = round_values(low, high)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-6 * (high - low) <= value <= high + 1e-6 * (high - low) for value in values)
    step = values[1] - values[0]
    digits = f"{step:.6e}".split("e")[0].rstrip("0").rstrip(".")
    assert digits in ("1", "2", "5")
    assert np.diff(values) == pytest.approx(step)


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-12, 1e12])
def test_a_constant_has_a_range(value: float) -> None:
    scale = Scale.of(np.full(5, value), BOTTOM, TOP)
    assert scale.low < scale.high
    assert TOP <= scale(np.array([value]))[0] <= BOTTOM


def test_numbers_are_short_and_right() -> None:
    said = {
        number(0.125): "0.125",
        number(12_500): "12.5k",
        number(1_100): "1100",
        number(3.2e-5): "3.2e-05",
        number(3.1e9, "B"): "3.1 GB",
        number(850, "B"): "850 B",
        number(-45_600_000): "-45.6M",
        number(float("nan")): "-",
        number(0.1 + 0.2 - 0.3): "0",
    }
    assert all(found == expected for found, expected in said.items()), said


def test_reward_against_kl_goes_through_its_points() -> None:
    reward, kl = random_column(3), np.sort(random_column(4))
    drawing = against("Reward against KL", Series(label="reward", x=kl, y=reward), "KL", "")
    assert len(drawing.lines[0].dots) == 20
    x = [(tick.place, float(tick.label)) for tick in drawing.x_ticks]
    y = [(tick.place, float(tick.label)) for tick in drawing.y_ticks]
    for (left, top), one_kl, one_reward in zip(drawing.lines[0].dots, kl, reward, strict=True):
        for place, value, ((p, v), *_, (q, w)) in ((left, one_kl, x), (top, one_reward, y)):
            assert v + (place - p) * (w - v) / (q - p) == pytest.approx(value, abs=1e-6)
    assert drawing.last == f"{number(reward[-1])} at {number(kl[-1])}"


@pytest.mark.parametrize("named", [(), ("reward",), ("kl", "gap_kl"), ("reward", "kl"), PPO[2:], PPO])
def test_whatever_of_ppo_there_is(tmp_path: Path, named: tuple[str, ...]) -> None:
    columns = {name: random_column(seed) for seed, name in enumerate(named)}
    text = render(write_run(tmp_path / "run", "ppo", columns, random_column(9)))
    titles = re.findall(r"<figcaption><span>([^<]*)</span>", text)
    assert {title for title in titles if title in TITLES.values()} == {TITLES[name] for name in named}
    assert ("Reward against KL" in titles) == ({"reward", "kl"} <= set(named))
    assert ("Reinforcement" in text) == bool(named)
    assert "Other measures" not in text
    parse(text)


def test_preferences_and_what_nobody_knows(tmp_path: Path) -> None:
    names = ("margin", "accuracy", "chosen_reward", "rejected_reward", "eval_bits_per_byte", HOSTILE)
    columns = {name: random_column(seed) for seed, name in enumerate(names)}
    columns["eval_bits_per_byte"][[0, 3, 19]] = [np.nan, np.inf, np.nan]
    losses = random_column(9)
    run = write_run(tmp_path / "run", "dpo", columns, losses)
    write_report(run, tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    page = parse(text)
    assert re.findall(r"<h2>([^<]*)</h2>", text) == [
        *("Learning", "Preferences", "Speed and memory", "Other measures", "Figures", "Configuration")
    ]
    assert "Eval bits per byte" in page.text
    assert HOSTILE.capitalize() in page.text  # as text
    assert f"start {HOSTILE}" in page.text
    assert "nan" not in text.split("</style>")[1].lower()
    assert "inf" not in text.split("</style>")[1].lower()
    assert "[dpo]" in page.text
    assert "0.000325" in page.text  # the learning rate of the configuration
    rows = dict(re.findall(r"<tr><td>([^<]*)</td>((?:<td class=\"number\">[^<]*</td>)+)", text))
    told = {name: re.findall(r">([^<]+)<", cells) for name, cells in rows.items()}
    assert told["Loss"] == [
        number(losses[0]),
        number(losses[-1]),
        number(losses[-2:].mean()),
        number(losses.min()),
        str(losses.argmin() + 1),
        number(losses.max()),
        str(losses.argmax() + 1),
    ]
    there = columns["eval_bits_per_byte"][np.isfinite(columns["eval_bits_per_byte"])]
    assert told["Eval bits per byte"][:2] == [number(there[0]), number(there[-1])]
    assert told["Rewards, chosen"][1] == number(columns["chosen_reward"][-1])
    assert {"20 of 20", "dpo", number(20 * 128), "40 s"} <= set(re.findall(r"<dd>([^<]*)</dd>", text))


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    write_run_info(config_of(tmp_path, 50), "pretrain")
    writer = ProgressWriter(tmp_path, 0)
    writer.add(progress(1, 2.5, steps=50))
    writer.flush()
    page = parse(render(tmp_path))
    assert "1 of 50, not finished" in page.text
    assert "[dpo]" not in page.text  # of no use to pretraining


def test_a_measure_of_some_steps_alone_is_kept(tmp_path: Path) -> None:
    writer = ProgressWriter(tmp_path, 0)
    for step, measures in enumerate([{}, {"late": 0.5}, {}], 1):
        writer.add(progress(step, 1.0, steps=3, **measures))
    writer.flush()
    assert [row.measures for row in read_metrics(tmp_path)] == [{}, {"late": 0.5}, {}]


def metrics_of(run: Path, content: bytes | pa.Table) -> Path:
    write_run_info(config_of(run, 5), "sft")
    if isinstance(content, bytes):
        (run / METRICS).write_bytes(content)
    else:
        pq.write_table(content, run / METRICS)
    return run


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        render(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no run of `rayllm train` .*run\.json is missing"):
        render(tmp_path / "empty")
    (tmp_path / "empty" / "run.json").write_text("[1")
    with pytest.raises(DataError, match=r"run\.json: is not what `rayllm train` writes"):
        render(tmp_path / "empty")
    write_run_info(config_of(tmp_path / "new", 5), "sft")
    with pytest.raises(DataError, match=r"new: has no metrics yet \(metrics\.parquet is missing\)"):
        render(tmp_path / "new")
    whole = write_run(tmp_path / "whole", "sft", {}, random_column(0)) / METRICS
    for name, content in {"half": whole.read_bytes()[:-100], "text": b"loss 1.5", "nothing": b""}.items():
        with pytest.raises(DataError, match=rf"{name}/metrics\.parquet: cannot be read"):
            render(metrics_of(tmp_path / name, content))
    damaged = bytearray(whole.read_bytes())
    damaged[4:200] = bytes(196)
    with pytest.raises(DataError, match=r"damaged/metrics\.parquet: cannot be read"):
        render(metrics_of(tmp_path / "damaged", bytes(damaged)))
    for number_, table in enumerate((pa.table({"loss": [1.0]}), pa.table({"step": pa.array([], pa.int64())}))):
        with pytest.raises(DataError, match=r"metrics\.parquet: names no steps"):
            render(metrics_of(tmp_path / f"stepless {number_}", table))


def test_columns_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    table = pa.table({"step": [2, 1], "loss": [1.0, 2.0], "note": ["a", "b"], "flag": [True, False]})
    page = parse(render(metrics_of(tmp_path / "run", table)))
    assert "Loss" in page.text
    assert "Note" not in page.text
    assert re.search(r"Loss\s*1\b", page.text)  # the later step's, though its row is the first


def rayllm(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rayllm", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    output = capsys.readouterr()
    return int(exit_.value.code or 0), output.out, output.err


def test_command_line(monkeypatch, capsys, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "sft", {}, random_column(0))
    assert rayllm(monkeypatch, capsys, "train", "report", run) == (0, "", f"wrote {run / 'report.html'}\n")
    parse((run / "report.html").read_text(encoding="utf-8"))
    other = tmp_path / "pages" / "one.html"
    status, out, _ = rayllm(monkeypatch, capsys, "train", "report", run, "--output", other, "--json")
    assert (status, json.loads(out)) == (0, {"path": str(other), "run": str(run)})
    assert other.read_text(encoding="utf-8") == (run / "report.html").read_text(encoding="utf-8")
    status, out, err = rayllm(monkeypatch, capsys, "train", "report", tmp_path / "nowhere")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'nowhere'}: no such folder")
    assert not (tmp_path / "nowhere").exists()


def test_a_real_run(tmp_path: Path, tiny_model: Path) -> None:
    """Of preference pairs: each measure that the recipe told of is on the page."""
    data = seven_pairs(tmp_path / "pairs", tiny_model, 32)
    config = TrainConfig(
        run=str(tmp_path / "run"),
        model=ModelConfig(start=str(tiny_model)),
        data=DataConfig(path=str(data)),
        batch=BatchConfig(sequence_length=32, tokens=128),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        schedule=ScheduleConfig(steps=3),
    )
    ranks = Ranks(1)
    try:
        ranks.run(1, train_ranks.run_recipe, "dpo", config)
    finally:
        ranks.close()
    page = parse(render(tmp_path / "run"))
    last = read_metrics(tmp_path / "run")[-1]
    assert last.measures.keys() == {"margin", "accuracy", "chosen_reward", "rejected_reward"}
    for value in (last.loss, last.grad_norm, last.learning_rate, *last.measures.values()):
        assert number(value) in page.text
    assert "3 of 3" in page.text
    assert "step-00000003" in page.text
    assert str(tiny_model) in page.text
