"""What is evaluated while a model is trained is what `rayllm eval` says of its checkpoints."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayllm.core.errors import ConfigError, DataError
from rayllm.eval.data import Data
from rayllm.eval.local_backend import LocalBackend
from rayllm.eval.registry import find_task
from rayllm.eval.run import run_tasks
from rayllm.eval.runner import EvalSettings
from rayllm.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from rayllm.train.data.rows import Kind
from rayllm.train.evaluation import _unseen
from rayllm.train.progress import read_metrics
from rayllm.train.recipes import RECIPES
from rayllm.train.saved import SavedRun
from rayllm.train.trainer import check
from tests import train_ranks
from tests.packed_rows import pack_rows, seven_pairs
from tests.ranks import Ranks

LENGTH, STEPS = 32, 5
TASKS = ("perplexity", "piqa")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def start(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model(num_key_value_heads=2, num_attention_heads=4)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts longer and shorter than the context, and questions with two answers; an odd number of each."""
    folder = tmp_path_factory.mktemp("documents")
    tables = {
        "perplexity/test": [{"text": "the cat sat on the mat. " * (1 + 13 * n)} for n in range(5)],
        "piqa/validation": [
            {"goal": f"Feed cat {n}", "sol1": "Fill its bowl." * (n + 1), "sol2": "Wait.", "label": n % 2}
            for n in range(7)
        ],
    }
    for name, rows in tables.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


Make = Callable[..., TrainConfig]


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, start: Path, documents: Path) -> Make:
    data = pack_rows(tmp_path_factory.mktemp("data"), start, Kind.TEXT, [{"text": "the dog sat. " * 60}], LENGTH)

    def config_of(run: Path, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "model": ModelConfig(start=str(start)),
            "batch": BatchConfig(sequence_length=LENGTH, tokens=4 * LENGTH),
            "optimizer": OptimizerConfig(learning_rate=3e-3),
            "schedule": ScheduleConfig(steps=STEPS, kind="constant"),
            "checkpoint": CheckpointConfig(every_steps=2, keep_last=9),
            "evaluation": EvaluationConfig(tasks=TASKS, data=str(documents), every_steps=2, num_fewshot=0),
        }
        return TrainConfig(run=str(run), data=DataConfig(path=str(data)), **{**settings, **changes})

    return config_of


def evaluated(model: Path, documents: Path) -> dict[str, float]:
    """By the engine, from the files."""
    from rayllm.core.config import CacheConfig, EngineConfig
    from rayllm.core.config import ModelConfig as EngineModelConfig

    config = EngineConfig(model=EngineModelConfig(model=str(model)), cache=CacheConfig(cpu_memory_bytes=64 << 20))
    backend = LocalBackend.open(config)
    try:
        settings = EvalSettings(num_fewshot=0)
        tasks = [find_task(name) for name in TASKS]
        report = run_tasks(tasks, backend, {}, Data(documents), settings, progress=_unseen)
    finally:
        backend.close()
    return metrics_of(report)


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task}.{name}": metric["value"]
        for task, result in report["tasks"].items()
        for name, metric in result["metrics"].items()
    }


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(),
        LayoutConfig(replicate=2, shard=2),
        LayoutConfig(shard=2, tensor=2),
        LayoutConfig(tensor=2, pipeline=2),
    ],
    ids=["alone", "hsdp", "fsdp x tp", "tp x pp"],
)
def test_it_is_what_eval_says_of_the_checkpoints(
    ranks: Ranks, make: Make, start: Path, documents: Path, layout: LayoutConfig, tmp_path: Path
) -> None:
    config = make(tmp_path, layout=layout)
    check(config, RECIPES["pretrain"])
    ranks.run(layout.world, train_ranks.run_recipe, "pretrain", config)
    models = {0: start, **{saved.state.step: saved.directory for saved in SavedRun(tmp_path).all()}}
    assert list(models) == [0, 2, 4, 5]
    rows = {row.step: row.measures for row in read_metrics(tmp_path)}
    losses = []
    for step, model in models.items():
        expected = evaluated(model, documents)
        assert len(expected) > 4
        folder = tmp_path / "evaluations" / f"step-{step:08d}"
        found = metrics_of(json.loads((folder / "results.json").read_text()))
        assert found == pytest.approx(expected, rel=1e-4)
        assert {path.name for path in (folder / "samples").iterdir()} == set(TASKS)
        assert rows[step] == found
        losses.append(found["perplexity.bits_per_byte"])
    assert losses[-1] < 0.9 * losses[0]
    assert rows[1] == rows[3] == {}, "steps after which nothing is evaluated"


def test_training_goes_as_it_would_without(ranks: Ranks, make: Make, tmp_path: Path) -> None:
    layout = LayoutConfig(shard=2)
    with_it = make(tmp_path / "with", layout=layout)
    without = make(tmp_path / "without", layout=layout, evaluation=EvaluationConfig())
    for config in (with_it, without):
        ranks.run(layout.world, train_ranks.run_recipe, "pretrain", config)
    rows = [[row for row in read_metrics(tmp_path / name) if row.step] for name in ("with", "without")]
    losses = [[(row.loss, row.grad_norm) for row in run] for run in rows]
    assert losses[0] == losses[1]
    assert not (tmp_path / "without" / "evaluations").exists()


def test_a_run_that_goes_on_evaluates_what_is_left(ranks: Ranks, make: Make, tmp_path: Path) -> None:
    """Also where an attempt had gone further than its last checkpoint."""
    config = make(tmp_path)
    ranks.run(1, train_ranks.run_recipe, "pretrain", replace(config, schedule=ScheduleConfig(steps=2, kind="constant")))
    lost = tmp_path / "evaluations" / "step-00000004"
    lost.mkdir()
    (lost / "run.json").write_text('{"model": "another"}')
    first = (tmp_path / "evaluations" / "step-00000002" / "results.json").read_bytes()
    ranks.run(1, train_ranks.run_recipe, "pretrain", config)
    assert (tmp_path / "evaluations" / "step-00000002" / "results.json").read_bytes() == first
    assert json.loads((lost / "results.json").read_text())["weight_version"] == "step-00000004"


@pytest.mark.parametrize(
    ("evaluation", "error", "problem"),
    [
        ({"tasks": ("piqua",)}, ConfigError, "piqua"),
        ({"tasks": ("humaneval",)}, ConfigError, "humaneval runs programs that the model writes"),
        ({"tasks": ("hellaswag",)}, DataError, "hellaswag"),
        ({"tasks": ("perplexity",), "every_steps": -1}, ConfigError, r"^evaluation.every_steps: -1 is negative"),
        ({"limit": 3}, ConfigError, r"^evaluation.tasks: names no task"),
        ({"tasks": ("perplexity",), "limit": 0}, ConfigError, r"^evaluation.limit: 0 is not positive"),
    ],
)
def test_what_is_refused_before_workers_start(
    make: Make, documents: Path, tmp_path: Path, evaluation: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        check(make(tmp_path, evaluation=EvaluationConfig(data=str(documents), **evaluation)), RECIPES["pretrain"])


def test_a_reward_model_is_asked_nothing(make: Make, start: Path, tmp_path: Path) -> None:
    pairs = seven_pairs(tmp_path / "pairs", start, LENGTH)
    with pytest.raises(ConfigError, match="a reward model writes no text"):
        check(replace(make(tmp_path / "run"), data=DataConfig(path=str(pairs))), RECIPES["rm"])
