"""A training configuration is read whole or refused with the name of what is wrong, before anything starts."""

from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup
from transformers.optimization import get_wsd_schedule

from rayllm.core.errors import ConfigError
from rayllm.models.families import spec_from_config
from rayllm.train.config import LayoutConfig, ScheduleConfig, check_layout
from rayllm.train.config_file import read_train_config
from rayllm.train.schedule import rate_share
from tests.tiny_models import tiny_config

TEXT = """
run = "runs/tiny"
[model]
start = "smollm2-135m"
[data]
path = "text.parquet"
[batch]
sequence_length = 64
tokens = 1024
rows = 2
[optimizer]
learning_rate = 1e-3
[schedule]
steps = 100
warmup_steps = 10
[layout]
replicate = 2
shard = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(TEXT)
    return path


def test_a_file_and_settings(file: Path) -> None:
    settings = ["optimizer.learning_rate=3e-4", "layout.shard = 4", "data.path=other.parquet"]
    config = read_train_config(file, [*settings, "model.recompute=true", "run=5"])
    assert config.run == "5"
    assert config.optimizer.learning_rate == 3e-4
    assert (config.layout.data, config.layout.world, config.micro_steps) == (8, 8, 1)
    assert config.data.path == "other.parquet"
    assert config.model.recompute is True
    assert config.schedule.kind == "cosine"


def test_groups_that_a_run_may_have(file: Path) -> None:
    """Those that divide the 16 rows of a step, two of which a rank takes at a time."""
    assert read_train_config(file, ["layout.replicate=4"]).replicates == [4]
    assert read_train_config(file, ["layout.replicate=4", "layout.min_replicate=1"]).replicates == [1, 2, 4]
    assert read_train_config(file, ["layout.replicate=4", "layout.shard=2", "layout.min_replicate=2"]).replicates == [
        2,
        4,
    ]


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("optimizer.learning_rat=1", r"--set: optimizer.learning_rat: .* nearest is optimizer.learning_rate$"),
        ("optimiser.eps=1", r"--set: optimiser: .* nearest is optimizer$"),
        ("layout=2", r"--set: layout: must be a table"),
        ("layout.shard", r"--set layout.shard: must be NAME=VALUE"),
        ("layout.shard=two", r"layout.shard: expected `int`, got `str`"),
        ("layout.shard=0", r"layout.shard: 0 is not positive"),
        ("layout.min_replicate=9", r"layout.min_replicate: 9 is not in 0 to replicate, 2"),
        ("layout.shard=3", r"16 rows of 64 tokens do not divide into batch.rows 2 x 6 ranks"),
        ("batch.tokens=1000", r"batch.tokens: 1000 is not a multiple of batch.sequence_length 64"),
        ("schedule.kind=linear", r"schedule.kind: invalid enum value 'linear'; it is one of constant"),
        ("schedule.kind=wsd", r"schedule.decay_steps: wsd needs to know"),
        ("schedule.warmup_steps=101", r"101 warmup and 0 decay steps are more than the 100 steps"),
        ("ppo.clip_low=1.5", r"ppo.clip_low: 1.5 is more than 1"),
        ("optimizer.beta1=1.0", r"optimizer.beta1: 1.0 is not in \[0, 1\)"),
    ],
)
def test_what_is_refused(file: Path, setting: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_train_config(file, [setting])


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_train_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("run = ")
    with pytest.raises(ConfigError, match="not a TOML file"):
        read_train_config(tmp_path / "bad.toml")
    (tmp_path / "short.toml").write_text('run = "x"')
    with pytest.raises(ConfigError, match="missing required field `model`"):
        read_train_config(tmp_path / "short.toml")


def test_a_layout_must_divide_the_model() -> None:
    spec = spec_from_config(tiny_config("llama-gqa", vocab_size=102))
    check_layout(spec, LayoutConfig(shard=5, tensor=3, pipeline=3))
    with pytest.raises(ConfigError, match="6 does not divide the model's 3 key/value heads"):
        check_layout(spec, LayoutConfig(tensor=6))
    with pytest.raises(ConfigError, match="pipeline parallel size 4 is more than the model's 3 layers"):
        check_layout(spec, LayoutConfig(pipeline=4))
    with pytest.raises(ConfigError, match="3 does not divide the vocabulary of 101 tokens"):
        check_layout(spec_from_config(tiny_config("llama-gqa")), LayoutConfig(tensor=3))


def _reference(make: object, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, **options)  # type: ignore[operator]
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules_equal_transformers() -> None:
    """Except in warmup, which transformers begins with a step at 0."""
    cosine = ScheduleConfig(steps=50, warmup_steps=5)
    expected = _reference(get_cosine_schedule_with_warmup, num_warmup_steps=5, num_training_steps=50)
    assert [rate_share(step, cosine) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [rate_share(step, cosine) for step in range(5, 50)] == pytest.approx(expected[5:])
    wsd = ScheduleConfig(kind="wsd", steps=50, warmup_steps=5, decay_steps=20, final=0.1)
    expected = _reference(
        get_wsd_schedule,
        num_warmup_steps=5,
        num_decay_steps=20,
        num_training_steps=50,
        min_lr_ratio=0.1,
        decay_type="1-sqrt",
    )
    assert [rate_share(step, wsd) for step in range(5, 50)] == pytest.approx(expected[5:])
