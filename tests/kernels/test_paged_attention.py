"""paged_attention and store_kv against dense attention in float64, with poison wherever nobody may look."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rayllm_kernels import paged_attention, paged_attention_reference, store_kv

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # of outputs of order one; bf16 rounds by 2**-9
ROWS, UNUSED_BLOCK = 7, 2**30


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """Serving runs so; under autograd the compiled kernels step aside."""
    with torch.inference_mode():
        yield


@dataclass
class Case:
    """Packed queries, a poisoned cache that holds their sequences, and the answer in float64."""

    q_THE: Tensor
    caches: tuple[Tensor, Tensor]
    arguments: dict[str, object]
    expected_THE: Tensor


def dense_attention(q_SHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, scale: float, window: int | None) -> Tensor:
    """Written apart from the kernels on purpose: one query and one head at a time."""
    length, heads = q_SHE.shape[:2]
    context, group = k_SKE.shape[0], heads // k_SKE.shape[1]
    out_SHE = torch.zeros_like(q_SHE)
    for i in range(length):
        at = context - length + i
        first = 0 if window is None else max(0, at - window + 1)
        for h in range(heads):
            keys, values = k_SKE[first : at + 1, h // group], v_SKE[first : at + 1, h // group]
            out_SHE[i, h] = ((keys @ q_SHE[i, h]) * scale).softmax(0) @ values
    return out_SHE


def make_case(
    lengths: list[tuple[int, int]],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    page: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.float32,
) -> Case:
    """`lengths`: (queries, context) of each sequence."""
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + heads + head_dim)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    blocks_of = [-(-context // page) for _, context in lengths]
    order = torch.randperm(sum(blocks_of) + 3, generator=generator).tolist()
    shape = (len(order), page, kv_heads, head_dim)
    caches = (torch.full(shape, torch.nan, dtype=cache_dtype), torch.full(shape, torch.nan, dtype=cache_dtype))
    block_tables_RM = torch.full((ROWS, max(blocks_of, default=0) + 2), UNUSED_BLOCK, dtype=torch.int32)
    rows = torch.randperm(ROWS, generator=generator)[: len(lengths)].int()
    q_THE = randn(sum(n for n, _ in lengths), heads, head_dim).to(dtype)
    expected_THE = torch.zeros(q_THE.shape, dtype=torch.float64)
    starts, scale = [0], 1 / math.sqrt(head_dim)
    for (length, context), blocks, row in zip(lengths, blocks_of, rows.tolist(), strict=True):
        mine, order = order[:blocks], order[blocks:]
        block_tables_RM[row, :blocks] = torch.tensor(mine, dtype=torch.int32)
        kv = [randn(context, kv_heads, head_dim).to(cache_dtype) for _ in caches]
        slots = torch.tensor([mine[j // page] * page + j % page for j in range(context)], dtype=torch.int64)
        for half in (slice(0, context // 2), slice(context // 2, context)):
            store_kv(kv[0][half], kv[1][half], *caches, slots[half])
        queries = slice(starts[-1], starts[-1] + length)
        starts.append(queries.stop)
        expected_THE[queries] = dense_attention(q_THE[queries].double(), kv[0].double(), kv[1].double(), scale, window)
    arguments: dict[str, object] = {
        "block_tables_RM": block_tables_RM,
        "rows_B": rows,
        "query_start_B1": torch.tensor(starts, dtype=torch.int32),
        "context_lens_B": torch.tensor([context for _, context in lengths], dtype=torch.int32),
        "scale": scale,
        "window": window,
    }
    return Case(q_THE, caches, arguments, expected_THE)


def check(case: Case) -> None:
    out = torch.full_like(case.q_THE, torch.nan)
    result = paged_attention(case.q_THE, *case.caches, **case.arguments, out=out)  # type: ignore[arg-type]
    assert result is out
    torch.testing.assert_close(
        result.double(), case.expected_THE, rtol=TOLERANCE[result.dtype], atol=TOLERANCE[result.dtype]
    )


MIXED = [(1, 160), (1, 1), (5, 5), (3, 40), (1, 17), (33, 70)]


@pytest.mark.parametrize("window", [None, 1, 7, 16, 1000])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_sequences(dtype: torch.dtype, cache_dtype: torch.dtype, window: int | None) -> None:
    check(make_case(MIXED, dtype=dtype, cache_dtype=cache_dtype, window=window))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 1), (5, 1)])
def test_head_layouts(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    check(make_case([(1, 37), (4, 21)], **shape, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("page", [1, 7, 16, 32])
def test_block_boundaries(page: int) -> None:
    lengths = [(1, context) for context in (page, page + 1, 2 * page + 1, 3 * page)]
    check(make_case(lengths, page=page))
    check(make_case([(n + 1, context) for n, context in lengths if context > 1], page=page, window=page))


def test_long_context_is_one_softmax() -> None:
    check(make_case([(1, 1500), (2, 1025)], heads=3, kv_heads=1))


def test_large_scores_do_not_overflow() -> None:
    case = make_case([(1, 50), (40, 40)])
    case.q_THE *= 400
    case.arguments["scale"] = 1.0
    expected = paged_attention_reference(case.q_THE.double(), *case.caches, **case.arguments)  # type: ignore[arg-type]
    case.expected_THE = expected
    check(case)


def test_empty_sequences_give_nothing_or_zeros() -> None:
    case = make_case([(1, 9), (0, 5), (1, 9)])
    check(case)
    case.arguments["context_lens_B"] = torch.zeros(3, dtype=torch.int32)
    case.expected_THE = torch.zeros_like(case.expected_THE)
    check(case)


def test_alone_and_in_a_batch_are_bitwise_equal() -> None:
    case = make_case([(1, 160), (1, 3), (1, 77)], heads=9, kv_heads=3)
    together = paged_attention(case.q_THE, *case.caches, **case.arguments)  # type: ignore[arg-type]
    for b in range(3):
        alone = {
            **case.arguments,
            "rows_B": case.arguments["rows_B"][b : b + 1],  # type: ignore[index]
            "context_lens_B": case.arguments["context_lens_B"][b : b + 1],  # type: ignore[index]
            "query_start_B1": torch.tensor([0, 1], dtype=torch.int32),
        }
        assert torch.equal(paged_attention(case.q_THE[b : b + 1], *case.caches, **alone)[0], together[b])


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_and_the_gathering_path_agree(monkeypatch: pytest.MonkeyPatch, cache_dtype: torch.dtype) -> None:
    case = make_case(MIXED, heads=9, kv_heads=3, window=50, cache_dtype=cache_dtype)
    check(case)
    monkeypatch.setattr(sys.modules["rayllm_kernels.paged_attention"], "_pages_in_place", lambda *_: False)
    check(case)


def test_under_autograd_torch_serves() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        case = make_case([(1, 20), (4, 30)])
        check(case)
        case.q_THE.requires_grad_()
        paged_attention(case.q_THE, *case.caches, **case.arguments).sum().backward()  # type: ignore[arg-type]
        assert case.q_THE.grad is not None


def test_strided_queries() -> None:
    case = make_case(MIXED, heads=9, kv_heads=3)
    wide = torch.randn(case.q_THE.shape[0], 15, case.q_THE.shape[2])
    wide[:, :9] = case.q_THE
    case.q_THE = wide[:, :9]
    check(case)


@pytest.mark.parametrize("lengths", [[(1, 30), (6, 30)], [(20, 20)]])
def test_reference_in_float64(lengths: list[tuple[int, int]]) -> None:
    case = make_case(lengths, dtype=torch.float64, cache_dtype=torch.float64, window=11)
    result = paged_attention_reference(case.q_THE, *case.caches, **case.arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(result, case.expected_THE, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [20, 24])  # 2 heads of 24: whole vectors, which the kernel takes
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_store_kv_touches_its_slots_only(
    tokens: int, head_dim: int, cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    caches = tuple(torch.full((9, 7, 2, head_dim), torch.nan, dtype=cache_dtype) for _ in range(2))
    k, v = (torch.randn(tokens, 2, head_dim).to(dtype) for _ in range(2))
    slots = torch.randperm(63)[:tokens]
    store_kv(k, v, *caches, slots)
    for cache, stored in zip(caches, (k, v), strict=True):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[slots], stored.to(cache_dtype))
        untouched = torch.ones(63, dtype=torch.bool)
        untouched[slots] = False
        assert flat[untouched].isnan().all()
