"""The attention of a step of decodes, chunks and prompts, against float64; for the unit tests and for Triton's."""

from dataclasses import replace

import torch
from torch import Tensor

from rayllm.engine.kv_cache import KVCache, KVLayout
from rayllm.engine.paged_context import PagedContext, Prompts
from rayllm.models.rope import RotaryEmbedding, Rotation
from rayllm.models.spec import RopeSpec
from rayllm_kernels import apply_rotary_reference, rotary_store_kv
from tests.kernels.exactness import assert_as_exact_as_torch, randn
from tests.kernels.paged_cases import dense_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE, SCALE = 6, 2, 32, 4, 0.2
# (queries, context): a decode, a chunk of a longer prompt, and prompts
PARTS = [(1, 37), (12, 30), (1, 1), (3, 3), (16, 16), (41, 41)]
QUERIES, CONTEXTS = (torch.tensor(counts) for counts in zip(*PARTS, strict=True))


def starts_of(lengths_B: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)]).int()


def everything(dtype: torch.dtype) -> tuple[PagedContext, tuple[Tensor, Tensor, Tensor], Tensor]:
    """All tokens of all parts, nothing cached -> (context, (q, k, v), position of each)."""
    blocks = [-(-context // PAGE) for _, context in PARTS]
    tables_RM = torch.zeros(len(PARTS), max(blocks), dtype=torch.int32)
    for row, count in enumerate(blocks):
        tables_RM[row, :count] = torch.arange(sum(blocks[:row]), sum(blocks[: row + 1])).flip(0)
    layout = KVLayout(
        layers=range(1),
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=PAGE,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    positions_T = torch.cat([torch.arange(context) for _, context in PARTS])
    rows_T = torch.arange(len(PARTS)).repeat_interleave(CONTEXTS)
    context = PagedContext(
        cache=KVCache(layout, sum(blocks)),
        block_tables_RM=tables_RM,
        rows_B=torch.arange(len(PARTS)).int(),
        query_start_B1=starts_of(CONTEXTS),
        context_lens_B=CONTEXTS.int(),
        slots_T=tables_RM[rows_T, positions_T // PAGE].long() * PAGE + positions_T % PAGE,
        rope_lengths_T=None,
        prompts=None,
    )
    fused = randn(len(positions_T), HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype)
    q, k, v = fused.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    return context, (q, k, v), positions_T


def dense(qkv: tuple[Tensor, Tensor, Tensor], rotation: Rotation, window: int | None, dtype: torch.dtype) -> Tensor:
    """The step's outputs, its maths in `dtype`; rotated in that of q, as what lies in the pages is."""
    q, k = apply_rotary_reference(*qkv[:2], rotation.cos_TE, rotation.sin_TE)
    parts = zip(PARTS, *(x.to(dtype).split(CONTEXTS.tolist()) for x in (q, k, qkv[2])), strict=True)
    return torch.cat([dense_attention(q[-queries:], k, v, SCALE, window) for (queries, _), q, k, v in parts])


@torch.inference_mode()
def check_mixed_step(dtype: torch.dtype, window: int | None, prompts: int) -> None:
    """However many of the prompts go without pages: the outputs, and the same keys and values in the pages."""
    whole, qkv, positions_T = everything(dtype)
    rotation = RotaryEmbedding(RopeSpec(theta=1000.0), HEAD_DIM).rotation(positions_T, None, dtype)
    pages = whole.cache.pages(0)[:2]
    rotary_store_kv(*qkv, rotation.cos_TE, rotation.sin_TE, *pages, whole.slots_T)
    expected = [page.clone() for page in pages]
    in_step = torch.cat([torch.arange(context) >= context - queries for queries, context in PARTS])
    starts_B1, first = starts_of(QUERIES), len(PARTS) - prompts
    step = replace(
        whole,
        rows_B=whole.rows_B[:first],
        query_start_B1=starts_B1[: first + 1],
        context_lens_B=whole.context_lens_B[:first],
        slots_T=whole.slots_T[in_step],
        prompts=Prompts(
            first_token=int(starts_B1[first]),
            cu_seqlens=starts_B1[first:] - starts_B1[first],
        ),
    )
    for page in pages:
        page.flatten(0, 1)[step.slots_T] = torch.nan
    mine = Rotation(rotation.cos_TE[in_step], rotation.sin_TE[in_step])
    q, k, v = (x[in_step] for x in qkv)
    out_THE = step.attend(0, q, k, v, mine, scale=SCALE, window=window)
    for page, right in zip(pages, expected, strict=True):
        assert torch.equal(page, right)
    assert_as_exact_as_torch(out_THE, *(dense(qkv, rotation, window, wide) for wide in (dtype, torch.float64)))
