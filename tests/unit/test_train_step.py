"""A step of our decoder is transformers' and torch's AdamW's, and the same under every layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rayllm.core.errors import DataError, TrainingError
from rayllm.models.checkpoint import Checkpoint
from rayllm.train.batch import MicroBatch
from rayllm.train.config import LayoutConfig, OptimizerConfig
from tests import train_ranks
from tests.ranks import Ranks
from tests.tiny_models import save_tiny
from tests.train_ranks import Trained

VOCAB = 102
# A gradient that is nothing but rounding (that of a key's bias is: softmax does not see it) moves a weight as far as
# any other unless eps is above it, and nobody's rounding is the reference.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0, eps=1e-3)
# Of two rows of 16 tokens each.
LENGTHS = [((5, 11), (16,)), ((1, 2, 13), (8, 8)), ((16,), (15, 1)), ((7, 9), (4, 4, 4, 4))]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def micro_batches(seed: int) -> list[MicroBatch]:
    """Four, with very different numbers of targets."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, lengths in enumerate(LENGTHS):
        token_ids = torch.randint(0, VOCAB, (2, 16), generator=generator)
        mask = torch.rand(2, 16, generator=generator) < (number + 0.5) / 4
        batch = MicroBatch(
            token_ids=token_ids, loss_mask=torch.zeros_like(mask), document_lengths=lengths, sample_ids=()
        )
        mask.view(-1)[batch.cu_seqlens[:-1]] = False
        batches.append(MicroBatch(token_ids=token_ids, loss_mask=mask, document_lengths=lengths, sample_ids=()))
    return batches


STEPS = [micro_batches(0), micro_batches(1), micro_batches(2)]


def run(
    ranks: Ranks, directory: Path, layout: LayoutConfig, steps: list[list[MicroBatch]] = STEPS, **model: Any
) -> list[Trained]:
    return ranks.run(layout.world, train_ranks.train, directory, layout, OPTIMIZER, steps, model)


def reference(model: PreTrainedModel, steps: list[list[MicroBatch]]) -> tuple[list[float], list[float]]:
    """Trains transformers' `model`, document by document; -> the loss and the gradient's norm of each step."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_embedding = any(part in name for part in ("embed", "wte", "wpe"))
        (decayed if parameter.ndim == 2 and not is_embedding else others).append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=OPTIMIZER.eps,
    )
    losses, norms = [], []
    for batches in steps:
        total = sum((document_loss(model, batch) for batch in batches), torch.zeros(()))
        loss = total / sum(batch.num_targets for batch in batches)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(loss.item())
        adamw.step()
        adamw.zero_grad()
    return losses, norms


def document_loss(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    total = torch.zeros(())
    for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        ids, mask = (one.flatten()[start:stop] for one in (batch.token_ids, batch.loss_mask))
        logits = model(ids[None]).logits[0]
        total = total + F.cross_entropy(logits[:-1][mask[1:]], ids[1:][mask[1:]], reduction="sum")
    return total


def check_weights(directory: Path, model: PreTrainedModel, trained: dict[str, Tensor], scratch: Path) -> None:
    """Against transformers' trained model, read back through the table of names."""
    model.save_pretrained(scratch)
    checkpoint = Checkpoint.open(scratch)
    for name, value in trained.items():
        expected = checkpoint.read(name, tuple(slice(0, size) for size in value.shape))
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ["llama-gqa", "llama-mqa-tied", "llama-biases", "qwen3-windows", "gpt2-tied"])
def test_steps_equal_transformers(ranks: Ranks, case: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "start", case, vocab_size=VOCAB)
    [trained] = run(ranks, tmp_path / "start", LayoutConfig())
    losses, norms = reference(model, STEPS)
    assert [report.loss for report in trained.reports] == pytest.approx(losses, abs=1e-5)
    assert [report.grad_norm for report in trained.reports] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 1, "nothing would be clipped"
    check_weights(tmp_path / "start", model, trained.weights, tmp_path / "trained")


def flat(batches: list[MicroBatch]) -> list[MicroBatch]:
    """The same documents, each padded in a row of its own."""
    padded = []
    for batch in batches:
        bounds = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False))
        token_ids, mask = (
            torch.zeros(len(bounds), 16, dtype=torch.int64),
            torch.zeros(len(bounds), 16, dtype=torch.bool),
        )
        for row, (start, stop) in enumerate(bounds):
            token_ids[row, : stop - start] = batch.token_ids.flatten()[start:stop]
            mask[row, : stop - start] = batch.loss_mask.flatten()[start:stop]
        lengths = tuple((stop - start, 16 - stop + start) if stop - start < 16 else (16,) for start, stop in bounds)
        padded.append(MicroBatch(token_ids=token_ids, loss_mask=mask, document_lengths=lengths, sample_ids=()))
    return padded


def check_same(trained: list[Trained], expected: Trained) -> None:
    """Losses to 1e-6 and norms to 1e-5 of what they are, on every rank; and the weights in the end."""
    for rank in trained:
        assert rank.reports == trained[0].reports
        for report, other in zip(rank.reports, expected.reports, strict=True):
            assert report.loss == pytest.approx(other.loss, abs=1e-6)
            assert report.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
            assert report.count == other.count
        for name, value in rank.weights.items():
            same = expected.weights.get(name, expected.weights.get("embed_tokens.weight"))
            torch.testing.assert_close(value, same, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert set().union(*(rank.weights for rank in trained)) >= set(expected.weights)


LAYOUTS = {
    "ddp": LayoutConfig(replicate=4),
    "fsdp": LayoutConfig(shard=4),
    "hsdp": LayoutConfig(replicate=2, shard=2),
    "tp": LayoutConfig(tensor=2),
    "pp": LayoutConfig(pipeline=2),
    "fsdp x tp": LayoutConfig(shard=2, tensor=2),
    "ddp x tp": LayoutConfig(replicate=2, tensor=2),
    "fsdp x pp": LayoutConfig(shard=2, pipeline=2),
    "tp x pp": LayoutConfig(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("case", ["llama-mqa-tied", "qwen3-bias-tied", "gpt2-untied"])
def test_every_layout_gives_the_same_steps(ranks: Ranks, case: str, tmp_path: Path) -> None:
    changes = {} if case.startswith("gpt2") else {"num_key_value_heads": 2}
    save_tiny(tmp_path, case, vocab_size=VOCAB, **changes)
    [alone] = run(ranks, tmp_path, LayoutConfig())
    failures = {}
    for name, layout in LAYOUTS.items():
        try:
            check_same(run(ranks, tmp_path, layout), alone)
        except AssertionError as failure:
            failures[name] = str(failure)
    assert not failures, "\n\n".join(f"{name}: {text}" for name, text in failures.items())


def test_packed_equals_padded_and_kept_equals_recomputed(ranks: Ranks, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-dynamic", vocab_size=VOCAB)
    [alone] = run(ranks, tmp_path, LayoutConfig())
    check_same(run(ranks, tmp_path, LayoutConfig(), [flat(batches) for batches in STEPS]), alone)
    check_same(run(ranks, tmp_path, LayoutConfig(shard=2), recompute=True), alone)


def test_bfloat16_computes_and_float32_learns(ranks: Ranks, tmp_path: Path) -> None:
    """Losses are float32's up to bfloat16's 8 bits, and steps that bfloat16 weights could not take are taken."""
    save_tiny(tmp_path, "llama-gqa", vocab_size=VOCAB)
    [exact] = run(ranks, tmp_path, LayoutConfig())
    [rounded] = run(ranks, tmp_path, LayoutConfig(), compute_dtype="bfloat16")
    for one, other in zip(rounded.reports, exact.reports, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2**-7)
        assert one.loss != other.loss
    small = OptimizerConfig(learning_rate=1e-6, weight_decay=0.0, eps=1e-4)
    for layout in (LayoutConfig(), LayoutConfig(shard=2, pipeline=2)):
        for rank in ranks.run(
            layout.world, train_ranks.train, tmp_path, layout, small, STEPS, {"compute_dtype": "bfloat16"}
        ):
            assert rank.reports[0].loss == pytest.approx(rounded.reports[0].loss, rel=2**-7)
            name = "layers.2.self_attn.q_proj.weight"
            if (moved := rank.weights.get(name)) is not None:
                start = Checkpoint.open(tmp_path).read(name, tuple(slice(0, size) for size in moved.shape))
                moves = (moved - start).abs()
                assert moved.dtype == torch.float32
                assert 0 < moves.max() < 1e-5
                assert (moved.bfloat16() == start.bfloat16()).float().mean() > 0.9


def nothing_to_learn(directory: Path) -> str:
    batch = STEPS[0][0]
    empty = MicroBatch(
        token_ids=batch.token_ids,
        loss_mask=torch.zeros_like(batch.loss_mask),
        document_lengths=batch.document_lengths,
        sample_ids=(),
    )
    step = train_ranks.make_step(directory, LayoutConfig(), OPTIMIZER)
    try:
        step([empty], 1.0)
    except DataError as error:
        return str(error)
    return "no refusal"


def infinite_weight(directory: Path) -> tuple[str, bool]:
    """-> what was said, whether another weight is still what it was."""
    step = train_ranks.make_step(directory, LayoutConfig(), OPTIMIZER)
    weights = dict(step.trainee.decoder.named_parameters())
    before = weights["embed_tokens.weight"].detach().clone()
    with torch.no_grad():
        weights["layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    try:
        step(STEPS[0], 1.0)
    except TrainingError as error:
        return str(error), torch.equal(before, weights["embed_tokens.weight"])
    return "no refusal", False


def test_what_a_step_refuses(ranks: Ranks, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-gqa", vocab_size=VOCAB)
    assert ranks.run(1, nothing_to_learn, tmp_path) == [
        "nothing to learn from in a whole step: the loss mask of every sample is empty"
    ]
    [(said, same)] = ranks.run(1, infinite_weight, tmp_path)
    assert "training has diverged" in said
    assert same
