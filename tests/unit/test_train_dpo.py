"""Learning from pairs equals a float64 statement of it on transformers' logits, and is the same under every layout."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rayllm.core.errors import ConfigError, DataError
from rayllm.train.batch import MicroBatch
from rayllm.train.config import (
    BatchConfig,
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
from rayllm.train.data.documents import Pair
from rayllm.train.data.rows import Kind
from rayllm.train.losses.pairs import num_pairs, pair_logps
from rayllm.train.progress import Progress, read_metrics
from rayllm.train.recipes import RECIPES
from rayllm.train.saved import SavedRun
from rayllm.train.trainer import check
from tests import train_ranks
from tests.packed_rows import pack_rows, seven_pairs
from tests.ranks import Ranks

LENGTH, PAIRS_PER_STEP, STEPS = 32, 4, 3
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1, max_grad_norm=1.0, eps=1e-4)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def start(make_tiny_model: Callable[..., Path]) -> Path:
    """Divides by two."""
    return make_tiny_model(num_key_value_heads=2, num_attention_heads=4)


@pytest.fixture(scope="module")
def wide_start(make_tiny_model: Callable[..., Path]) -> Path:
    """Wide enough for sums to be rounded otherwise where they are taken otherwise."""
    return make_tiny_model(hidden_size=512, num_key_value_heads=2, num_attention_heads=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    return seven_pairs(tmp_path_factory.mktemp("pairs"), start, LENGTH)


def config_of(run: Path, start: Path, data: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(start=str(start)),
        "batch": BatchConfig(sequence_length=LENGTH, tokens=PAIRS_PER_STEP * LENGTH),
        "optimizer": OPTIMIZER,
        "schedule": ScheduleConfig(steps=STEPS, kind="constant"),
    }
    return TrainConfig(run=str(run), data=DataConfig(path=str(data)), **{**settings, **changes})


def run(ranks: Ranks, config: TrainConfig) -> list[Progress]:
    ranks.run(config.layout.world, train_ranks.run_recipe, "dpo", config)
    return read_metrics(Path(config.run))


def weights(config: TrainConfig) -> dict[str, Tensor]:
    saved = SavedRun(Path(config.run)).latest()
    assert saved is not None
    return dict(AutoModelForCausalLM.from_pretrained(saved.directory).named_parameters())


def answer_logps(model: PreTrainedModel, pair: Pair) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected answer, summed."""
    sums = []
    for answer in (pair.chosen, pair.rejected):
        log_probs = model(torch.tensor([pair.prompt + answer])).logits[0].log_softmax(-1)
        first = len(pair.prompt)
        sums.append(sum(log_probs[first + n - 1, token] for n, token in enumerate(answer)))
    return sums[0], sums[1]


def pair_loss(config: DpoConfig, c: Tensor, r: Tensor, len_c: int, len_r: int) -> Tensor:
    """`c`, `r`: of the answers the log ratios to the reference (of SimPO: log-probabilities)."""
    if config.loss in ("ipo_mean", "simpo"):
        c, r = c / len_c, r / len_r
    bh, e = config.beta * (c - r), config.label_smoothing
    kept, flipped = torch.log1p(torch.exp(-bh)), torch.log1p(torch.exp(bh))
    return {
        "sigmoid": (1 - e) * kept + e * flipped,
        "robust": ((1 - e) * kept - e * flipped) / (1 - 2 * e),
        "hinge": torch.clamp(1 - bh, min=0),
        "ipo_sum": (c - r - 0.5 / config.beta) ** 2,
        "ipo_mean": (c - r - 0.5 / config.beta) ** 2,
        "simpo": torch.log1p(torch.exp(config.gamma - bh)),
    }[config.loss]


def reference_run(start: Path, dataset: PackedDataset, config: DpoConfig) -> tuple[list[dict[str, float]], Any]:
    """Transformers' model in float64, torch's AdamW; one pair, one answer at a time."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
    with torch.no_grad():
        stored = [answer_logps(model, dataset.pair(n)) for n in range(len(dataset))]
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    cursor, steps = Cursor(seed=0), []
    for _ in range(STEPS):
        losses, rewards = [], []
        for n in cursor.next_samples(PAIRS_PER_STEP, len(dataset)).tolist():
            pair = dataset.pair(n)
            ours, theirs = answer_logps(model, pair), stored[n]
            c, r = ours if config.loss == "simpo" else (ours[0] - theirs[0], ours[1] - theirs[1])
            losses.append(pair_loss(config, c, r, len(pair.chosen), len(pair.rejected)))
            by = (len(pair.chosen), len(pair.rejected)) if config.loss in ("ipo_mean", "simpo") else (1, 1)
            rewards.append((config.beta * c.item() / by[0], config.beta * r.item() / by[1]))
        cursor = cursor.advanced(PAIRS_PER_STEP, len(dataset))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        adamw.step()
        adamw.zero_grad()
        steps.append(
            {
                "loss": loss.item(),
                "grad_norm": norm,
                "margin": float(np.mean([c - r for c, r in rewards])),
                "chosen_reward": float(np.mean([c for c, _ in rewards])),
                "rejected_reward": float(np.mean([r for _, r in rewards])),
                "accuracy": float(np.mean([c > r for c, r in rewards])),
            }
        )
    return steps, model


@pytest.mark.parametrize(
    "dpo",
    [
        DpoConfig(),
        DpoConfig(beta=0.5, label_smoothing=0.2),
        DpoConfig(loss="robust", label_smoothing=0.1),
        DpoConfig(loss="hinge", beta=0.3),
        DpoConfig(loss="ipo_sum"),
        DpoConfig(loss="ipo_mean", beta=0.4),
        DpoConfig(loss="simpo", beta=2.0, gamma=0.7),
    ],
    ids=lambda dpo: f"{dpo.loss}-{dpo.label_smoothing}",
)
def test_steps_equal_float64(ranks: Ranks, dpo: DpoConfig, start: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, start, data, dpo=dpo)
    metrics = run(ranks, config)
    expected, model = reference_run(start, PackedDataset(data), dpo)
    for row, step in zip(metrics, expected, strict=True):
        assert row.loss == pytest.approx(step["loss"], rel=1e-5, abs=1e-5)
        assert row.grad_norm == pytest.approx(step["grad_norm"], rel=1e-5)
        assert row.count == PAIRS_PER_STEP
        for name in ("margin", "chosen_reward", "rejected_reward"):
            assert row.measures[name] == pytest.approx(step[name], abs=1e-5), name
        if row.step > 1 or dpo.loss == "simpo":  # before, the margin is 0, and rounding decides
            assert row.measures["accuracy"] == step["accuracy"]
    assert max(step["grad_norm"] for step in expected) > 1, "nothing would be clipped"
    for name, value in weights(config).items():
        torch.testing.assert_close(value.double(), model.get_parameter(name), rtol=0, atol=1e-5)


LAYOUTS = {
    "ddp": LayoutConfig(replicate=2),
    "fsdp": LayoutConfig(shard=2),
    "hsdp": LayoutConfig(replicate=2, shard=2),
    "tp": LayoutConfig(tensor=2),
    "pp": LayoutConfig(pipeline=2),
    "fsdp x tp": LayoutConfig(shard=2, tensor=2),
    "fsdp x pp": LayoutConfig(shard=2, pipeline=2),
    "tp x pp": LayoutConfig(tensor=2, pipeline=2),
}


def test_every_layout_starts_at_ln_2_and_goes_the_same_way(
    ranks: Ranks, start: Path, data: Path, tmp_path: Path
) -> None:
    alone_config = config_of(tmp_path / "alone", start, data)
    alone = run(ranks, alone_config)
    alone_weights = weights(alone_config)
    assert alone[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert abs(alone[0].measures["margin"]) < 2e-6
    assert alone[-1].loss < alone[0].loss
    failures = {}
    for name, layout in LAYOUTS.items():
        config = config_of(tmp_path / name, start, data, layout=layout)
        try:
            metrics = run(ranks, config)
            assert metrics[0].loss == pytest.approx(math.log(2), abs=1e-6)
            assert abs(metrics[0].measures["margin"]) < 2e-6
            for row, other in zip(metrics, alone, strict=True):
                assert row.loss == pytest.approx(other.loss, abs=1e-6)
                assert row.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
                assert row.count == other.count
                assert row.measures["margin"] == pytest.approx(other.measures["margin"], abs=5e-6)
            for parameter, value in weights(config).items():
                torch.testing.assert_close(value, alone_weights[parameter], rtol=0, atol=1e-5)
        except AssertionError as failure:
            failures[name] = str(failure)
    assert not failures, "\n\n".join(f"{name}: {text}" for name, text in failures.items())


@pytest.mark.parametrize("layout", [LayoutConfig(), *LAYOUTS.values()], ids=["alone", *LAYOUTS])
def test_bfloat16_starts_at_ln_2_too(
    ranks: Ranks, layout: LayoutConfig, wide_start: Path, data: Path, tmp_path: Path
) -> None:
    """It rounds otherwise in another micro-batch and in other kernels; the reference is asked in the same."""
    model = ModelConfig(start=str(wide_start), compute_dtype="bfloat16")
    config = config_of(tmp_path, wide_start, data, model=model, layout=layout, schedule=ScheduleConfig(steps=1))
    [first] = run(ranks, config)
    assert first.loss == pytest.approx(math.log(2), abs=1e-7)
    assert (first.measures["margin"], first.measures["chosen_reward"]) == (0, 0)


@pytest.mark.parametrize("layout", [LayoutConfig(shard=2), LayoutConfig(replicate=2)], ids=["fsdp", "ddp"])
def test_a_run_goes_on_with_the_stored_reference(
    ranks: Ranks, layout: LayoutConfig, start: Path, data: Path, tmp_path: Path
) -> None:
    whole = run(ranks, config_of(tmp_path / "whole", start, data, layout=layout))
    first = config_of(tmp_path / "run", start, data, layout=layout, schedule=ScheduleConfig(steps=2, kind="constant"))
    run(ranks, first)
    [stored] = (tmp_path / "run" / "reference").iterdir()
    inode = stored.stat().st_ino
    then = config_of(tmp_path / "run", start, data, layout=layout)
    check(then, RECIPES["dpo"])
    metrics = run(ranks, then)
    assert [row.step for row in metrics] == [1, 2, 3]
    assert [(row.loss, row.measures) for row in metrics] == [(row.loss, row.measures) for row in whole]
    assert stored.stat().st_ino == inode, "computed again"
    # Deleted it is computed again, by the start model and not by what is trained.
    content = stored.read_bytes()
    stored.unlink()
    longer = config_of(tmp_path / "run", start, data, layout=layout, schedule=ScheduleConfig(steps=4, kind="constant"))
    run(ranks, longer)
    assert stored.read_bytes() == content


def test_another_reference_than_the_run_began_with_is_refused(
    ranks: Ranks, start: Path, data: Path, tmp_path: Path, make_tiny_model: Callable[..., Path]
) -> None:
    config = config_of(tmp_path / "run", start, data)
    check(config, RECIPES["dpo"])
    run(ranks, config)
    check(config, RECIPES["dpo"])
    other = make_tiny_model(num_hidden_layers=2)
    with pytest.raises(DataError, match="the run began with a reference of another weights; go on with what"):
        check(config_of(tmp_path / "run", other, data), RECIPES["dpo"])
    fewer = pack_rows(
        tmp_path / "fewer", start, Kind.PREFERENCE, [{"prompt": "a", "chosen": "b", "rejected": "c"}], LENGTH
    )
    with pytest.raises(DataError, match="a reference of another data"):
        check(config_of(tmp_path / "run", start, fewer), RECIPES["dpo"])
    half = ModelConfig(start=str(start), compute_dtype="bfloat16")
    with pytest.raises(DataError, match="a reference of another dtype"):
        check(config_of(tmp_path / "run", start, data, model=half), RECIPES["dpo"])
    with pytest.raises(DataError, match="the run began with another start model"):  # without a reference too
        check(config_of(tmp_path / "run", other, data, dpo=DpoConfig(loss="simpo")), RECIPES["dpo"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dpo": DpoConfig(beta=0)}, r"^dpo.beta: must be above 0"),
        ({"dpo": DpoConfig(loss="hinge", label_smoothing=0.1)}, r"^dpo.label_smoothing: is for sigmoid and robust"),
        ({"dpo": DpoConfig(gamma=0.5)}, r"^dpo.gamma: is for simpo, not for sigmoid"),
        ({"model": "random"}, r"^model.random: preferences are between answers of a model"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], problem: str, start: Path, data: Path, tmp_path: Path) -> None:
    if "model" in changes:
        changes = {"model": ModelConfig(start=str(start), random=True)}
    with pytest.raises(ConfigError, match=problem):
        check(config_of(tmp_path, start, data, **changes), RECIPES["dpo"])


def test_padding_teaches_nothing() -> None:
    """Also where an odd number of documents pads."""
    mask = [[False, True, False, True, True]]
    batch = MicroBatch(
        token_ids=torch.arange(5)[None],
        loss_mask=torch.tensor(mask),
        document_lengths=((2, 3),),
        sample_ids=(0,),
    )
    for length, lengths in ((5, (2, 3)), (6, (2, 3, 1)), (9, (2, 3, 4)), (14, (2, 3, 4, 4, 1))):
        padded = batch.padded(length, longest=4)
        assert padded.document_lengths == (lengths,)
        assert (num_pairs(padded), padded.num_targets) == (1, 3)
        found = pair_logps(torch.where(padded.targets_T >= 0, -padded.targets_T.float(), 0.0), padded)
        assert (found.chosen_P.tolist(), found.rejected_P.tolist()) == ([-1], [-7])
        assert (found.chosen_tokens_P.tolist(), found.rejected_tokens_P.tolist()) == ([1], [2])
