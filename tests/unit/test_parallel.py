"""A model split over processes, with real gloo groups, gives transformers' logits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rayllm.models.checkpoint import Checkpoint
from tests import sharded_forward
from tests.ranks import Ranks
from tests.sharded_forward import RankReport
from tests.tiny_models import save_tiny

LENGTHS = (20, 1, 9)
CU_SEQLENS = [0, 20, 21, 30]
# 6 query heads, 101 tokens and 3 layers: the vocabulary is padded, stages are uneven, kv heads are split or shared.
LAYOUTS = {
    "llama-biases": [(3, 1), (6, 1), (1, 2), (1, 3), (3, 2)],  # 3 kv heads
    "llama-mqa-tied": [(2, 1), (3, 1), (2, 2), (3, 3)],
    "llama-dynamic": [(3, 2)],
    "qwen2-windows": [(3, 1), (1, 3)],
    "qwen3-bias-tied": [(3, 1), (1, 2), (3, 3)],
    "gpt2-tied": [(2, 1), (3, 1), (2, 2), (1, 3)],
    "gpt2-untied": [(2, 2)],
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(9)
    yield ranks
    ranks.close()


def packed_ids() -> Tensor:
    return torch.randint(0, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def reference_logits(model: PreTrainedModel) -> Tensor:
    return torch.cat([model(one[None]).logits[0] for one in packed_ids().split(LENGTHS)])


def run(
    ranks: Ranks, directory: Path, tp: int, pp: int, dtype: torch.dtype = torch.float32, *, fuse: bool = False
) -> list[RankReport]:
    return ranks.run(tp * pp, sharded_forward.forward, directory, tp, pp, packed_ids(), CU_SEQLENS, dtype, fuse)


def joined_logits(reports: list[RankReport], tp: int, pp: int) -> Tensor:
    """Of tensor rank 0 of the last stage; no other rank has any."""
    [(rank, logits_TV)] = [(rank, one.logits_TV) for rank, one in enumerate(reports) if one.logits_TV is not None]
    assert rank == (pp - 1) * tp
    return logits_TV


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_gives_the_same_logits(ranks: Ranks, case: str, tmp_path: Path) -> None:
    expected = reference_logits(save_tiny(tmp_path, case))
    for tp, pp in LAYOUTS[case]:
        logits_TV = joined_logits(run(ranks, tmp_path, tp, pp), tp, pp)
        assert logits_TV.shape == (30, 101)
        torch.testing.assert_close(logits_TV, expected, rtol=0, atol=1e-4, msg=f"{tp} x {pp} differs")


@pytest.mark.parametrize("tp", [3, 9])
def test_nine_heads_with_three_kv_heads(ranks: Ranks, tp: int, tmp_path: Path) -> None:
    """SmolLM2's heads: a kv head on each of three ranks, then each on three of nine."""
    reference = save_tiny(
        tmp_path, "llama-gqa", num_attention_heads=9, hidden_size=72, head_dim=8, tie_word_embeddings=True
    )
    logits_TV = joined_logits(run(ranks, tmp_path, tp, 1), tp, 1)
    torch.testing.assert_close(logits_TV, reference_logits(reference), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["llama-biases", "qwen3-gqa", "gpt2-tied"])
def test_fused_slices_give_the_same_logits(ranks: Ranks, case: str, tmp_path: Path) -> None:
    expected = reference_logits(save_tiny(tmp_path, case))
    for tp, pp in [(1, 1), (3, 2)]:
        logits_TV = joined_logits(run(ranks, tmp_path, tp, pp, fuse=True), tp, pp)
        torch.testing.assert_close(logits_TV, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_travels_between_ranks(ranks: Ranks, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = reference_logits(save_tiny(tmp_path, "gpt2-tied"))
    logits_TV = joined_logits(run(ranks, tmp_path, 2, 2, dtype), 2, 2)
    assert logits_TV.dtype == dtype
    error = (logits_TV.float() - expected).abs().max()
    assert error < 10 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_rank_reads_only_its_slice(ranks: Ranks, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-biases", num_key_value_heads=6)
    spec = Checkpoint.open(tmp_path).spec
    alone = run(ranks, tmp_path, 1, 1)[0]
    assert alone.num_read == alone.num_held == spec.num_params
    reports = run(ranks, tmp_path, 3, 3)
    # Every rank of a stage also holds the stage's norms and the biases that are added after a sum.
    shared = spec.num_layers * 4 * spec.hidden_size + spec.hidden_size
    assert sum(one.num_read for one in reports) == spec.num_params + 2 * shared
    for report in reports:
        padding = report.num_held - report.num_read
        assert padding in (0, spec.hidden_size)  # 101 tokens over three ranks: the last one holds a token of zeros


def test_a_mesh_must_fill_its_world(ranks: Ranks) -> None:
    refusals = ranks.run(2, sharded_forward.mesh_refusal, 3, 1)
    assert refusals == ["tensor 3 x pipeline 1 needs 3 processes, the world has 2"] * 2
