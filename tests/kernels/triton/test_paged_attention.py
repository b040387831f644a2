"""Attention over pages by Triton's interpreter, against float64.

Tiles are small here, so that short sequences have several of them and several splits.
"""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.gpu import paged_attention as op
from rayllm_kernels.gpu.split_work import Bounds, find_work
from tests.kernels.paged_cases import PagedCase, dense_attention, make_case

DECODE = op.Config(block_m=16, tile=16, num_warps=4, num_stages=1, min_tiles=1, programs_per_sm=1)
PREFILL = dataclasses.replace(DECODE, block_m=32, whole_tiles=True)
MIXED = [(1, 160), (1, 1), (5, 5), (3, 40), (1, 17), (33, 70), (0, 9)]
STEPS = [(1, 90), (1, 1), (1, 16), (1, 17)]


def attend(case: PagedCase, config: op.Config, *, processors: int) -> Tensor:
    out = torch.empty(case.q_THE.shape, dtype=case.q_THE.dtype)
    op.launch(
        case.q_THE,
        case.k_cache,
        case.v_cache,
        case.k_scales,
        case.v_scales,
        case.block_tables_RM,
        case.rows_B,
        case.query_start_B1,
        case.context_lens_B,
        case.scale,
        case.window,
        out,
        processors=processors,
        config=config,
    )
    return out


@pytest.mark.parametrize("config", [DECODE, PREFILL], ids=["plain", "whole tiles"])
@pytest.mark.parametrize("window", [None, 1, 50])
def test_mixed_sequences(window: int | None, config: op.Config) -> None:
    case = make_case(MIXED, window=window)
    case.check(attend(case, config, processors=16))


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=["", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [STEPS, [(3, 20), (17, 40)]], ids=["decode", "prefill"])
def test_dtypes(lengths: list[tuple[int, int]], dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    case = make_case(lengths, dtype=dtype, cache_dtype=cache_dtype)
    case.check(attend(case, PREFILL, processors=8))


@pytest.mark.parametrize("magnitudes", [[100.0], [1e-4], [1e-6], [1.0, 1e-4], [0.0, 1e-3]])
@pytest.mark.parametrize("lengths", [(1, 40), (5, 20)], ids=["decode", "prefill"])
def test_values_of_any_magnitude_in_an_int8_cache(lengths: tuple[int, int], magnitudes: list[float]) -> None:
    """Of half of the keys one, of the others another: float16 has no normal numbers below 6e-5, scales do."""
    case = make_case([lengths], heads=2, kv_heads=1, dtype=torch.float16, cache_dtype=torch.int8)
    assert case.k_scales is not None
    assert case.v_scales is not None
    context = lengths[1]
    page = case.k_cache.shape[1]
    key = torch.arange(context)
    slots = case.block_tables_RM[case.rows_B[0], key // page] * page + key % page
    factors = torch.tensor(magnitudes)[key * len(magnitudes) // context]
    case.v_scales.flatten(0, 1)[slots] *= factors[:, None]
    k, v = (
        cache.flatten(0, 1)[slots].double() * scales.flatten(0, 1)[slots].double()[..., None]
        for cache, scales in ((case.k_cache, case.k_scales), (case.v_cache, case.v_scales))
    )
    exact = dense_attention(case.q_THE.double(), k, v, case.scale, None)
    out = attend(case, PREFILL, processors=2)
    # Weights and the result are rounded once each, to 11 bits; of the result the last is 2**-24 where it is subnormal
    bound = 2 * 2**-11 * dense_attention(case.q_THE.double(), k, v.abs(), case.scale, None) + 2**-25
    assert ((out.double() - exact).abs() <= bound).all()


def test_a_query_wider_than_the_cache() -> None:
    case = make_case(STEPS, dtype=torch.bfloat16, cache_dtype=torch.float32)
    case.check(attend(case, DECODE, processors=8))


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (5, 1)])
@pytest.mark.parametrize("lengths", [STEPS[:2], [(7, 21)]], ids=["decode", "prefill"])
def test_head_layouts(lengths: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int) -> None:
    case = make_case(lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    case.check(attend(case, DECODE, processors=8))


@pytest.mark.parametrize("head_dim", [96, 256])
@pytest.mark.parametrize("lengths", [STEPS[:2], [(7, 21)]], ids=["decode", "prefill"])
def test_wide_heads(lengths: list[tuple[int, int]], head_dim: int) -> None:
    case = make_case(lengths, heads=4, kv_heads=2, head_dim=head_dim)
    case.check(attend(case, DECODE, processors=4))


def test_a_group_that_fills_more_than_a_decode_block() -> None:
    case = make_case(STEPS[:2], heads=20, kv_heads=1, head_dim=16)
    case.check(attend(case, DECODE, processors=4))


@pytest.mark.parametrize("page", [1, 7, 16, 64])
def test_pages_need_not_fit_tiles(page: int) -> None:
    case = make_case([(1, 3 * page), (1, page + 1), (1, 65), (1, page)], page=page)
    case.check(attend(case, DECODE, processors=16))


@pytest.mark.parametrize("processors", [1, 4, 6, 60])
@pytest.mark.parametrize("lengths", [STEPS, [(40, 90), (1, 200)]], ids=["decode", "prefill"])
def test_any_number_of_splits(lengths: list[tuple[int, int]], processors: int) -> None:
    """60: a split for each tile of the longest block, and none for others of its sequence, which see fewer tiles."""
    case = make_case(lengths)
    case.check(attend(case, PREFILL, processors=processors))


def test_scores_that_overflow_alone() -> None:
    case = make_case([(1, 50), (20, 40)], spread=300)
    case.check(attend(case, PREFILL, processors=8))


def test_no_context_gives_zeros() -> None:
    case = make_case([(1, 9), (2, 5)])
    case = dataclasses.replace(case, context_lens_B=torch.zeros(2, dtype=torch.int32))
    assert torch.equal(attend(case, DECODE, processors=8), torch.zeros_like(case.q_THE))


def test_more_sequences_than_a_program_takes_in_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "BLOCK_B", 4)
    case = make_case([(1, 1 + b % 3) for b in range(9)] + [(1, 60)], heads=2, kv_heads=1, head_dim=16)
    case.check(attend(case, DECODE, processors=14))


def test_heads_of_a_fused_product() -> None:
    case = make_case(STEPS)
    wide = torch.randn(4, 10, 64)
    wide[:, :6] = case.q_THE
    case = dataclasses.replace(case, q_THE=wide[:, :6])
    case.check(attend(case, DECODE, processors=8))


def test_the_same_call_gives_the_same_bits() -> None:
    case = make_case(STEPS)
    assert torch.equal(attend(case, DECODE, processors=16), attend(case, DECODE, processors=16))


@pytest.mark.parametrize("int8", [False, True])
def test_op(int8: bool) -> None:
    """With the configuration that ships; and torch's own checks of the registration."""
    case = make_case(
        [(1, 70), (2, 40)], heads=3, kv_heads=1, dtype=torch.float16, cache_dtype=torch.int8 if int8 else None
    )
    tensors = (case.k_cache, case.v_cache, case.k_scales, case.v_scales, case.block_tables_RM, case.rows_B)
    lengths = (case.query_start_B1, case.context_lens_B)
    out = torch.empty_like(case.q_THE)
    arguments = (case.q_THE, *tensors, *lengths, case.scale, case.window, out)
    torch.ops.rayllm.paged_attention(*arguments)
    case.check(out)
    torch.library.opcheck(torch.ops.rayllm.paged_attention, arguments)


@triton.jit
def _places_kernel(
    places: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    num_sequences: tl.tensor,
    window: tl.tensor,
    max_items: tl.tensor,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    ONLY_SPLIT: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    found = find_work(
        index, starts, contexts, num_sequences, window, max_items, BLOCK_Q, TILE, HAS_WINDOW, MIN_TILES, 4, ONLY_SPLIT
    )
    for i in tl.static_range(4):
        tl.store(places + index * 4 + i, found[i])


@pytest.mark.parametrize("max_items", [5, 30])
@pytest.mark.parametrize("min_tiles", [1, 3])
@pytest.mark.parametrize("block_q", [1, 4])
@pytest.mark.parametrize("seed", range(2))
def test_work_is_shared_out_within_the_bounds(seed: int, block_q: int, min_tiles: int, max_items: int) -> None:
    """Against the rule written down in plain Python: everything once, nothing past the bounds, slots without gaps."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9 if block_q > 1 else 2, (7,), generator=generator)
    contexts = lengths + torch.randint(0, 70, (7,), generator=generator)
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    tile, window = 8, None if seed else 33
    bounds = Bounds(
        tokens=int(lengths.sum()),
        sequences=7,
        max_context=int(contexts.max()),
        block_q=block_q,
        tile=tile,
        min_tiles=min_tiles,
        max_items=max_items,
    )
    blocks = [-(-n // block_q) for n in lengths.tolist()]
    tiles = [-(-n // tile) for n in contexts.tolist()]
    if window is not None:
        tiles = [min(n, -(-(window + block_q - 1) // tile) + 1) for n in tiles]
    work = sum(b * n for b, n in zip(blocks, tiles, strict=True))
    per_split = max(-(-work // max_items), min_tiles)
    splits = [max(1, (n + per_split // 2) // per_split) for n in tiles]
    items, joins, slot = [], [], 0
    for b, (count, split) in enumerate(zip(blocks, splits, strict=True)):
        items += [[b, i, split, slot if split > 1 else 0] for i in range(count * split)]
        joins += [[b, i, split, slot] for i in range(count) if split > 1]
        slot += count * split if split > 1 else 0
    assert len(items) <= bounds.items
    assert len(joins) <= bounds.split_blocks
    assert slot <= bounds.slots
    for only_split, expected, most in ((False, items, bounds.items), (True, joins, bounds.split_blocks)):
        places = torch.full((most + 1, 4), -7, dtype=torch.int32)
        _places_kernel[(most + 1,)](
            places,
            starts,
            contexts.int(),
            7,
            window or 0,
            max_items,
            block_q,
            tile,
            window is not None,
            min_tiles,
            only_split,
        )
        if not only_split:  # the slot of a block that is not split means nothing
            places[places[:, 2] == 1, 3] = 0
        assert places[: len(expected)].tolist() == expected
        assert (places[len(expected) :, 0] == -1).all()
