"""A pair whose prompt is read once against transformers in float64, which reads both whole texts apart."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm.train.batch import MicroBatch
from rayllm.train.data.dataset import pair_batch
from rayllm.train.data.documents import Pair
from rayllm.train.head import Head
from rayllm.train.losses.pairs import pair_logps
from tests.tiny_models import CASES, save_tiny

# Of prompt, chosen and rejected: past every window; with nothing to share; with one token of either answer.
LENGTHS = [(17, 5, 9), (1, 4, 2), (2, 1, 1), (11, 1, 12), (9, 14, 1)]


def make_pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(11)
    drawn = [[torch.randint(101, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS]
    return [Pair(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in drawn]


PAIRS = make_pairs()
WEIGHTS = torch.randn(2, len(PAIRS), generator=torch.Generator().manual_seed(12), dtype=torch.float64)


def by_transformers(model: PreTrainedModel, pair: Pair) -> tuple[Tensor, Tensor]:
    """The sums of the answers' log-probabilities. Where angles depend on the longest text of a batch, one of the pair's
    two texts, both are as long as that, by what nothing of them sees."""
    texts = [pair.prompt + answer for answer in (pair.chosen, pair.rejected)]
    is_dynamic = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    if is_dynamic:
        model(torch.zeros(1, 1, dtype=torch.int64))  # or it would go on with the angles of the longest text yet
    sums = []
    for text in texts:
        behind = max(map(len, texts)) - len(text) if is_dynamic else 0
        log_probs = model(torch.tensor([text + [0] * behind])).logits[0].log_softmax(-1)
        sums.append(sum(log_probs[n - 1, text[n]] for n in range(len(pair.prompt), len(text))))
    return sums[0], sums[1]


def by_rows(decoder: Decoder, batch: MicroBatch) -> Tensor:
    """[2, pairs]: of the chosen and of the rejected answers."""
    context = DenseContext(batch.cu_seqlens, batch.prefixes)
    assert torch.equal(context.positions_T, batch.positions_T)
    hidden_TD = decoder(batch.token_ids.flatten(), batch.positions_T, context)
    assert decoder.lm_head is not None
    weight_VD = decoder.lm_head.weight
    assert isinstance(weight_VD, Tensor)
    found = pair_logps(Head(weight_VD, None).log_probs(hidden_TD, batch.targets_T), batch)
    return torch.stack([found.chosen_P, found.rejected_P])


def gradients(decoder: Decoder, batch: MicroBatch, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    sums = by_rows(decoder, batch)
    parameters = list(decoder.parameters())
    return sums.detach(), list(torch.autograd.grad((sums * weights).sum(), parameters))


def load(directory: Path, dtype: torch.dtype) -> Decoder:
    return load_shard(Checkpoint.open(directory), Mesh.single(), dtype=dtype, device=torch.device("cpu"))


def norm(values: Sequence[Tensor]) -> float:
    return float(torch.stack([value.double().norm() for value in values]).norm())


@pytest.mark.parametrize("case", CASES)
def test_sums_and_gradients_equal_those_of_whole_texts(case: str, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, case).double()
    expected = torch.stack([torch.stack(by_transformers(reference, pair)) for pair in PAIRS], dim=1)
    (expected * WEIGHTS).sum().backward()
    right = norm([parameter.grad for parameter in reference.parameters() if parameter.grad is not None])
    batch = pair_batch(PAIRS, range(len(PAIRS)), 0)
    assert batch.token_ids.numel() == sum(sum(lengths) + 1 for lengths in LENGTHS)
    for shape in (batch, batch.padded(batch.token_ids.numel() + 50, 20)):
        for dtype, sums_within, norm_within in ((torch.float64, 1e-5, 1e-6), (torch.float32, 1e-4, 1e-5)):
            sums, found = gradients(load(tmp_path, dtype), shape, WEIGHTS)
            torch.testing.assert_close(sums, expected.detach(), rtol=0, atol=sums_within)
            assert norm(found) == pytest.approx(right, rel=norm_within)


def apart(pairs: Sequence[Pair]) -> MicroBatch:
    """Every text whole, sharing nothing."""
    texts = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    return MicroBatch(
        token_ids=torch.tensor([[token for prompt, answer in texts for token in prompt + answer]]),
        loss_mask=torch.tensor([[n >= len(p) for p, answer in texts for n in range(len(p + answer))]]),
        document_lengths=(tuple(len(prompt + answer) for prompt, answer in texts),),
        sample_ids=tuple(range(len(pairs))),
    )


def test_each_gradient_is_that_of_whole_texts(tmp_path: Path) -> None:
    """Not their norm alone."""
    save_tiny(tmp_path, "qwen2-windows")
    decoder = load(tmp_path, torch.float64)
    sums, found = gradients(decoder, pair_batch(PAIRS, range(len(PAIRS)), 0), WEIGHTS)
    whole_sums, expected = gradients(decoder, apart(PAIRS), WEIGHTS)
    torch.testing.assert_close(sums, whole_sums, rtol=1e-12, atol=1e-12)
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-10, atol=1e-12)
