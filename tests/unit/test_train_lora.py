"""Adapters learn as peft's do beside transformers' model, under every layout, and others load what comes out."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayllm.core.errors import ConfigError, DataError
from rayllm.models.checkpoint import SCORE, Checkpoint
from rayllm.models.families import spec_from_config
from rayllm.train.config import (
    CheckpointConfig,
    DpoConfig,
    LayoutConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.reference import ReferenceKey, read_reference
from rayllm.train.initial import with_adapters, with_score
from rayllm.train.lora import check_lora
from rayllm.train.progress import Progress, read_metrics
from rayllm.train.recipes import RECIPES
from rayllm.train.saved import SavedRun
from rayllm.train.trainer import check
from tests import train_ranks
from tests.packed_rows import seven_pairs
from tests.ranks import Ranks
from tests.tiny_models import save_tiny, tiny_config
from tests.train_ranks import Trained
from tests.unit.test_train_dpo import answer_logps
from tests.unit.test_train_dpo import config_of as dpo_config
from tests.unit.test_train_step import LAYOUTS, OPTIMIZER, STEPS, VOCAB, check_same, document_loss

# What peft asks transformers for is called otherwise in transformers' next version.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = LoraConfig(rank=4, alpha=24.0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def run(ranks: Ranks, directory: Path, layout: LayoutConfig, lora: LoraConfig = LORA, **model: Any) -> list[Trained]:
    return ranks.run(layout.world, train_ranks.train, directory, layout, OPTIMIZER, STEPS, {"lora": lora, **model})


def adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if ".lora_" in name}


def start_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Of adapters, as a run of seed 0 draws them."""
    return with_adapters(lambda *_: torch.empty(0), 0)(name, shape)


def reference(model: Any, lora: LoraConfig) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Trains peft's adapters beside transformers' `model`; -> losses, norms, and the adapters by our names."""
    peft = get_peft_model(model, PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)))
    learnt = {name: one for name, one in peft.named_parameters() if one.requires_grad}
    ours = {name.removeprefix("base_model.model.model."): one for name, one in learnt.items()}
    with torch.no_grad():
        for name, one in ours.items():
            one.copy_(start_weight(name, tuple(one.shape)))
    adamw = torch.optim.AdamW(learnt.values(), lr=1e-2, betas=(0.9, 0.95), eps=OPTIMIZER.eps, weight_decay=0.1)
    losses, norms = [], []
    for batches in STEPS:
        total = sum((document_loss(peft, batch) for batch in batches), torch.zeros(()))
        loss = total / sum(batch.num_targets for batch in batches)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learnt.values(), 1.0)))
        losses.append(loss.item())
        adamw.step()
        adamw.zero_grad()
    return losses, norms, {name: one.detach() for name, one in ours.items()}


@pytest.mark.parametrize(
    ("case", "lora"),
    [
        ("llama-gqa", LORA),
        ("qwen3-bias-tied", LoraConfig(rank=3, alpha=1.5, targets=("q_proj", "down_proj"))),
        ("mistral-window", LoraConfig(rank=1, alpha=4.0, targets=("v_proj",))),
    ],
)
def test_steps_equal_peft_beside_transformers(ranks: Ranks, case: str, lora: LoraConfig, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, case, vocab_size=VOCAB)
    [trained] = run(ranks, tmp_path, LayoutConfig(), lora)
    losses, norms, expected = reference(model, lora)
    assert [report.loss for report in trained.reports] == pytest.approx(losses, abs=1e-5)
    assert [report.grad_norm for report in trained.reports] == pytest.approx(norms, rel=1e-5)
    learnt = adapters(trained.weights)
    assert learnt.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            learnt[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(value.abs().max() > 1e-3 for value in learnt.values())
    checkpoint = Checkpoint.open(tmp_path)
    for name, value in trained.weights.items():
        if name not in learnt:
            stored = checkpoint.read(name.replace(".base_layer.", "."), tuple(slice(0, size) for size in value.shape))
            assert torch.equal(value, stored), name


def test_adapters_begin_as_pefts_do() -> None:
    a, b = (start_weight(f"layers.0.mlp.up_proj.lora_{side}.default.weight", (64, 100)) for side in "AB")
    assert not b.any()
    assert a.abs().max() <= 0.1
    assert a.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    other = start_weight("layers.1.mlp.up_proj.lora_A.default.weight", (64, 100))
    assert not torch.equal(a, other)


@pytest.mark.parametrize("case", ["llama-mqa-tied", "qwen3-bias-tied"])
def test_every_layout_gives_the_same_steps(ranks: Ranks, case: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, case, vocab_size=VOCAB, num_key_value_heads=2)
    [alone] = run(ranks, tmp_path, LayoutConfig())
    failures = {}
    for name, layout in LAYOUTS.items():
        try:
            check_same(run(ranks, tmp_path, layout), alone)
        except AssertionError as failure:
            failures[name] = str(failure)
    assert not failures, "\n\n".join(f"{name}: {text}" for name, text in failures.items())
    check_same(run(ranks, tmp_path, LayoutConfig(shard=2), recompute=True), alone)


def test_bfloat16_computes_and_float32_learns(ranks: Ranks, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-gqa", vocab_size=VOCAB)
    [exact] = run(ranks, tmp_path, LayoutConfig())
    for layout in (LayoutConfig(), LayoutConfig(shard=2)):
        for rounded in run(ranks, tmp_path, layout, compute_dtype="bfloat16"):
            for one, other in zip(rounded.reports, exact.reports, strict=True):
                assert one.loss == pytest.approx(other.loss, rel=2**-6)
                assert one.loss != other.loss
            assert all(value.dtype == torch.float32 for value in rounded.weights.values())


def train(ranks: Ranks, start: Path, to: Path, layout: LayoutConfig, saved_after: int = 0) -> list[Trained]:
    return ranks.run(
        layout.world,
        train_ranks.train_with_checkpoint,
        start,
        to,
        layout,
        OPTIMIZER,
        STEPS,
        saved_after,
        {"lora": LORA},
    )


@pytest.mark.parametrize(
    "layout", [LayoutConfig(), LayoutConfig(shard=2, tensor=2), LayoutConfig(pipeline=2, shard=2)], ids=str
)
def test_training_goes_on_bit_by_bit(ranks: Ranks, layout: LayoutConfig, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start", "llama-mqa-tied", vocab_size=VOCAB, num_key_value_heads=2)
    through = train(ranks, tmp_path / "start", tmp_path / "run", layout, saved_after=2)
    resumed = train(ranks, tmp_path / "start", tmp_path / "run", layout)
    for one, other in zip(resumed, through, strict=True):
        assert one.reports == other.reports[2:]
        assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    [alone] = train(ranks, tmp_path / "start", tmp_path / "run", LayoutConfig())
    check_same([alone], Trained(through[0].reports[2:], alone.weights))


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("llama-mqa-tied", LayoutConfig()),
        ("qwen3-bias-tied", LayoutConfig(shard=2, tensor=2)),
        ("llama-biases", LayoutConfig(pipeline=2, shard=2)),
    ],
)
def test_peft_and_transformers_load_what_was_learnt(
    ranks: Ranks, case: str, layout: LayoutConfig, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    save_tiny(start, case, vocab_size=VOCAB, **({} if case == "llama-biases" else {"num_key_value_heads": 2}))
    train(ranks, start, tmp_path / "run", layout, saved_after=3)
    saved = SavedRun(tmp_path / "run").latest()
    assert saved is not None
    saved.verify()
    assert sorted(path.name for path in (saved.directory / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(start)(ids).logits
        merged, report = AutoModelForCausalLM.from_pretrained(saved.directory, output_loading_info=True)
        assert not any(report.values()), report
        base = AutoModelForCausalLM.from_pretrained(start)
        adapted = PeftModel.from_pretrained(base, saved.directory / "adapter")
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)
        assert (merged(ids).logits - before).abs().max() > 1e-2
    described = json.loads((saved.directory / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(start)
    assert (described["r"], described["lora_alpha"], described["task_type"]) == (4, 24.0, "CAUSAL_LM")


@pytest.fixture(scope="module")
def start(make_tiny_model: Callable[..., Path]) -> Path:
    """Divides by two."""
    return make_tiny_model(num_key_value_heads=2, num_attention_heads=4)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    return seven_pairs(tmp_path_factory.mktemp("pairs"), start, 32)


def run_pairs(ranks: Ranks, recipe: str, config: TrainConfig) -> list[Progress]:
    ranks.run(config.layout.world, train_ranks.run_recipe, recipe, config)
    return read_metrics(Path(config.run))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_begins_at_the_start_model_and_goes_on_from_it(
    ranks: Ranks, start: Path, pairs: Path, dtype: Any, tmp_path: Path
) -> None:
    """Also when the reference has to be asked again after adapters have learnt."""
    rate = OptimizerConfig(learning_rate=1e-2)
    config = dpo_config(
        tmp_path / "run",
        start,
        pairs,
        lora=LoraConfig(rank=2),
        optimizer=rate,
        model=ModelConfig(start=str(start), compute_dtype=dtype),
        layout=LayoutConfig(shard=2, tensor=2),
        checkpoint=CheckpointConfig(every_steps=1),
    )
    first, *_, last = run_pairs(ranks, "dpo", config)
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    assert first.measures["margin"] == 0
    assert last.loss < 0.9 * first.loss
    dataset = PackedDataset(pairs)
    said = read_reference(tmp_path / "run" / "reference", ReferenceKey.of(start, dataset, dtype), len(dataset))
    assert said is not None
    if dtype == "float32":
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
        with torch.no_grad():
            expected = torch.tensor([answer_logps(model, dataset.pair(n)) for n in range(len(dataset))])
        found = torch.tensor([*zip(said.chosen.tolist(), said.rejected.tolist(), strict=True)], dtype=torch.float64)
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-4)
    shutil.rmtree(tmp_path / "run" / "reference")
    shutil.rmtree(SavedRun(tmp_path / "run").all()[-1].directory)
    assert run_pairs(ranks, "dpo", config)[-1].loss == last.loss


def test_a_reward_models_head_learns_whole(ranks: Ranks, start: Path, pairs: Path, tmp_path: Path) -> None:
    layout = LayoutConfig(pipeline=2)
    run_pairs(ranks, "rm", dpo_config(tmp_path, start, pairs, lora=LoraConfig(rank=2), layout=layout))
    saved = SavedRun(tmp_path).latest()
    assert saved is not None
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        merged = AutoModelForSequenceClassification.from_pretrained(saved.directory)
        base = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
        adapted = PeftModel.from_pretrained(base, saved.directory / "adapter")
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)
    fresh = start_weights_of_score(start)
    assert 1e-5 < (merged.score.weight.detach() - fresh).abs().max() < 1e-3


def start_weights_of_score(start: Path) -> Tensor:
    size = Checkpoint.open(start).spec.hidden_size
    return with_score(lambda *_: torch.empty(0), 0)(SCORE, (1, size))


def test_another_start_or_other_adapters_than_the_run_began_with(
    ranks: Ranks, start: Path, pairs: Path, make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    lora = LoraConfig(rank=2)
    config = dpo_config(tmp_path, start, pairs, lora=lora, dpo=DpoConfig(loss="simpo"))
    run_pairs(ranks, "dpo", config)
    check(config, RECIPES["dpo"])
    with pytest.raises(DataError, match="the run began with another lora; go on with what it began with"):
        check(replace(config, lora=replace(lora, alpha=1.0)), RECIPES["dpo"])
    other = ModelConfig(start=str(make_tiny_model(num_hidden_layers=2)))
    with pytest.raises(DataError, match="the run began with another start model;"):
        check(replace(config, model=other), RECIPES["dpo"])
    with pytest.raises(DataError, match="the run began with another lora"):
        check(replace(config, lora=LoraConfig()), RECIPES["dpo"])


@pytest.mark.parametrize(
    ("case", "lora", "random", "problem"),
    [
        ("gpt2-tied", LORA, False, r"^lora: gpt2 is not supported: its checkpoints hold q, k and v as one matrix"),
        ("llama-gqa", LORA, True, r"^model.random: adapters change a model that has learnt"),
        ("llama-gqa", LoraConfig(alpha=1.0), False, r"^lora.rank: is 0, which means no adapters"),
    ],
)
def test_what_is_refused(case: str, lora: LoraConfig, random: bool, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_lora(lora, spec_from_config(tiny_config(case)), random=random)


def test_settings_that_mean_nothing() -> None:
    for changes, problem in (
        ({"rank": -1}, "lora.rank: -1 is negative"),
        ({"rank": 1, "alpha": 0.0}, "lora.alpha: 0.0 is not positive"),
        ({"rank": 1, "targets": ()}, r"lora.targets: \[\] must name at least one"),
        ({"rank": 1, "targets": ("q_proj", "q_proj")}, "and each once"),
    ):
        with pytest.raises(ConfigError, match=problem):
            LoraConfig(**changes)  # type: ignore[arg-type]


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "peft")
    with pytest.raises(ConfigError, match=r"lora: needs peft; install it with: pip install 'rayllm\[lora\]'"):
        check_lora(LORA, spec_from_config(tiny_config("llama-gqa")), random=False)


def test_operations_of_a_step(ranks: Ranks, tmp_path: Path) -> None:
    """4 for a frozen weight and a token, 6 for one of an adapter, counted on the weights themselves."""
    save_tiny(tmp_path, "llama-gqa", vocab_size=VOCAB)
    [trained], [whole] = (run(ranks, tmp_path, LayoutConfig(), lora) for lora in (LORA, LoraConfig()))
    for report, other in zip(trained.reports, whole.reports, strict=True):
        learnt = sum(value.numel() for value in adapters(trained.weights).values())
        frozen = sum(v.numel() for n, v in whole.weights.items() if v.ndim == 2 and n.startswith("layers"))
        head = whole.weights["lm_head.weight"].numel()
        assert report.flops == other.flops + report.tokens * (6 * learnt - 2 * frozen) - report.count * 2 * head
