"""A reward model learns as transformers' sequence classifier does in float64, and is one when it is saved."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, PreTrainedModel

from rayllm.core.errors import ConfigError, DataError
from rayllm.core.tokenizer import Tokenizer
from rayllm.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DpoConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from rayllm.train.data.cursor import Cursor
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.export import write_config
from rayllm.train.progress import Progress, read_metrics
from rayllm.train.recipes import RECIPES
from rayllm.train.saved import SavedRun
from rayllm.train.trainer import check
from tests import train_ranks
from tests.packed_rows import seven_pairs
from tests.ranks import Ranks

LENGTH, PAIRS_PER_STEP, STEPS = 32, 4, 3
MEASURES = ("margin", "accuracy", "chosen_reward", "rejected_reward")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def start(request: pytest.FixtureRequest, make_tiny_model: Callable[..., Path]) -> Path:
    """Divides by two."""
    return make_tiny_model(num_key_value_heads=2, num_attention_heads=4, tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    return seven_pairs(tmp_path_factory.mktemp("pairs"), start, LENGTH)


def config_of(run: Path, start: Path, data: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(start=str(start)),
        "batch": BatchConfig(sequence_length=LENGTH, tokens=PAIRS_PER_STEP * LENGTH),
        "optimizer": OptimizerConfig(learning_rate=1e-4, weight_decay=0.1, max_grad_norm=1.0, eps=1e-4),
        "schedule": ScheduleConfig(steps=STEPS, kind="constant"),
        "checkpoint": CheckpointConfig(every_steps=1, keep_last=STEPS),
    }
    return TrainConfig(run=str(run), data=DataConfig(path=str(data)), **{**settings, **changes})


def run(ranks: Ranks, config: TrainConfig) -> list[Progress]:
    ranks.run(config.layout.world, train_ranks.run_recipe, "rm", config)
    return read_metrics(Path(config.run))


def classifiers(config: TrainConfig) -> list[PreTrainedModel]:
    """As transformers loads each checkpoint of the run."""
    return [
        AutoModelForSequenceClassification.from_pretrained(saved.directory)
        for saved in SavedRun(Path(config.run)).all()
    ]


def rewards(model: PreTrainedModel, dataset: PackedDataset, step: int) -> Tensor:
    """[pairs of the step, 2], of one text after another: no padding."""
    order = Cursor(seed=0).next_samples((step + 1) * PAIRS_PER_STEP, len(dataset))[step * PAIRS_PER_STEP :]
    pairs = [dataset.pair(sample) for sample in order.tolist()]
    return torch.stack(
        [
            torch.stack([model(torch.tensor([pair.prompt + answer])).logits[0, 0] for answer in answers])
            for pair in pairs
            for answers in [(pair.chosen, pair.rejected)]
        ]
    )


def told(scores: Tensor) -> dict[str, float]:
    """The formula of trl 1.16 (`trl/trainer/reward_trainer.py`): -logsigmoid(chosen - rejected), its mean."""
    chosen, rejected = scores.double().unbind(1)
    return {
        "loss": math.fsum(math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True)) / len(scores),
        "margin": float((chosen - rejected).mean()),
        "accuracy": float((chosen > rejected).double().mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }


def test_what_is_saved_is_a_classifier_that_scores_as_training_does(
    ranks: Ranks, start: Path, data: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path / "run", start, data)
    metrics = run(ranks, config)
    models = classifiers(config)
    assert [type(model) for model in models] == [LlamaForSequenceClassification] * STEPS
    assert [model.config.num_labels for model in models] == [1] * STEPS
    for step, model in enumerate(models[:-1], 1):
        expected = told(rewards(model.eval(), PackedDataset(data), step).detach())
        found = {"loss": metrics[step].loss, **metrics[step].measures}
        assert found == pytest.approx(expected, abs=1e-5)
    assert len({row.loss for row in metrics}) == STEPS


def test_a_step_equals_float64(ranks: Ranks, start: Path, data: Path, tmp_path: Path) -> None:
    """Loss and norm of the gradient, before clipping, of the step after the first checkpoint."""
    config = config_of(tmp_path / "run", start, data)
    metrics = run(ranks, config)
    first = classifiers(config)[0].double().eval()
    scores = rewards(first, PackedDataset(data), 1)
    torch.nn.functional.softplus(scores[:, 1] - scores[:, 0]).mean().backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in first.parameters() if p.grad is not None))
    assert metrics[1].grad_norm == pytest.approx(norm, rel=1e-5)
    assert metrics[1].loss == pytest.approx(told(scores.detach())["loss"], abs=1e-5)


LAYOUTS = {
    "ddp": LayoutConfig(replicate=2),
    "fsdp": LayoutConfig(shard=2),
    "hsdp": LayoutConfig(replicate=2, shard=2),
    "tp": LayoutConfig(tensor=2),
    "pp": LayoutConfig(pipeline=2),
    "fsdp x tp": LayoutConfig(shard=2, tensor=2),
    "tp x pp": LayoutConfig(tensor=2, pipeline=2),
}


def test_every_layout_goes_the_same_way(ranks: Ranks, start: Path, data: Path, tmp_path: Path) -> None:
    alone_config = config_of(tmp_path / "alone", start, data)
    alone = run(ranks, alone_config)
    weights = dict(classifiers(alone_config)[-1].named_parameters())
    failures = {}
    for name, layout in LAYOUTS.items():
        config = config_of(tmp_path / name, start, data, layout=layout)
        try:
            for row, other in zip(run(ranks, config), alone, strict=True):
                assert row.loss == pytest.approx(other.loss, abs=1e-6)
                assert row.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
                assert row.count == other.count
                assert row.measures == pytest.approx(other.measures, rel=1e-6, abs=5e-6)
            for parameter, value in classifiers(config)[-1].named_parameters():
                torch.testing.assert_close(value, weights[parameter], rtol=0, atol=1e-5)
        except AssertionError as failure:
            failures[name] = str(failure)
    assert not failures, "\n\n".join(f"{name}: {text}" for name, text in failures.items())


@pytest.mark.parametrize("layout", [LayoutConfig(), LayoutConfig(shard=2)], ids=["alone", "fsdp"])
def test_a_run_goes_on(ranks: Ranks, layout: LayoutConfig, start: Path, data: Path, tmp_path: Path) -> None:
    whole = run(ranks, config_of(tmp_path / "whole", start, data, layout=layout))
    config = config_of(tmp_path / "run", start, data, layout=layout)
    run(ranks, replace(config, schedule=ScheduleConfig(steps=1, kind="constant")))
    metrics = run(ranks, config)
    assert [row.step for row in metrics] == [1, 2, 3]
    assert [(row.loss, row.measures) for row in metrics] == [(row.loss, row.measures) for row in whole]


def test_it_learns(ranks: Ranks, start: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", start, data, schedule=ScheduleConfig(steps=25, kind="constant"))
    metrics = run(ranks, replace(config, checkpoint=CheckpointConfig()))
    assert metrics[-1].measures["accuracy"] == 1
    assert metrics[-1].measures["margin"] > 1
    assert metrics[-1].loss < 0.2


def test_an_answers_end_is_no_padding(start: Path, tmp_path: Path) -> None:
    """Where both are one token, transformers scores one text at a time, by its last token, or says that it cannot."""
    end = Tokenizer.load(start).eos_token_ids
    source = tmp_path / "source"
    source.mkdir()
    for path in start.glob("*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((start / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "pad_token_id": min(end)}))
    for scores, expected in ((True, None), (False, min(end))):
        out = tmp_path / str(scores)
        out.mkdir()
        write_config(source, out, "float32", scores=scores)
        assert json.loads((out / "config.json").read_text())["pad_token_id"] == expected


def test_what_is_refused(start: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, start, data)
    with pytest.raises(ConfigError, match=r"^model.random: rewards are for answers"):
        check(replace(config, model=ModelConfig(start=str(start), random=True)), RECIPES["rm"])
    with pytest.raises(ConfigError, match=r"^dpo: rm has no use for it"):
        check(replace(config, dpo=DpoConfig(beta=0.2)), RECIPES["rm"])
    with pytest.raises(DataError, match="reads text"):
        check(config, RECIPES["pretrain"])
