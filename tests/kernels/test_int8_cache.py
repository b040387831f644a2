"""Caches of int8 with a scale for each token and head: written by store_kv, read by paged_attention, on CPU."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rayllm_kernels import paged_attention, paged_attention_reference, store_kv
from rayllm_kernels.store_kv import quantize_heads
from tests.kernels.paged_cases import PagedCase, make_case

MIXED = [(1, 160), (1, 1), (5, 5), (3, 40), (1, 17), (33, 70), (0, 9)]
DTYPES = [torch.float32, torch.bfloat16]


def attend(case: PagedCase, out: Tensor) -> Tensor:
    return paged_attention(
        case.q_THE,
        case.k_cache,
        case.v_cache,
        block_tables_RM=case.block_tables_RM,
        rows_B=case.rows_B,
        query_start_B1=case.query_start_B1,
        context_lens_B=case.context_lens_B,
        scale=case.scale,
        window=case.window,
        k_scales_NPK=case.k_scales,
        v_scales_NPK=case.v_scales,
        out=out,
    )


@torch.inference_mode()
@pytest.mark.parametrize("head_dim", [64, 80, 20])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [MIXED, [(1, 100), (1, 3)]], ids=["mixed", "decode"])
def test_attention(lengths: list[tuple[int, int]], dtype: torch.dtype, window: int | None, head_dim: int) -> None:
    case = make_case(lengths, dtype=dtype, cache_dtype=torch.int8, window=window, head_dim=head_dim)
    case.check(attend(case, torch.full_like(case.q_THE, math.nan)))


def test_reference_in_float64() -> None:
    case = make_case(MIXED, dtype=torch.float64, cache_dtype=torch.int8, window=11)
    result = paged_attention_reference(
        case.q_THE,
        case.k_cache,
        case.v_cache,
        block_tables_RM=case.block_tables_RM,
        rows_B=case.rows_B,
        query_start_B1=case.query_start_B1,
        context_lens_B=case.context_lens_B,
        scale=case.scale,
        window=11,
        k_scales_NPK=case.k_scales,
        v_scales_NPK=case.v_scales,
    )
    torch.testing.assert_close(result, case.expected_THE, rtol=1e-12, atol=1e-12)


@torch.inference_mode()
@pytest.mark.parametrize("head_dim", [16, 80, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_store_touches_its_slots_only(tokens: int, dtype: torch.dtype, head_dim: int) -> None:
    caches = [torch.full((9, 7, 2, head_dim), -128, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full((9, 7, 2), math.nan) for _ in range(2)]
    qkv = torch.randn(tokens, 6, head_dim).to(dtype)
    kv = qkv[:, 2:4], qkv[:, 4:]
    kv[1][:1, 1] = 0
    slots = torch.randperm(63)[:tokens]
    store_kv(*kv, *caches, slots, *scales)
    untouched = torch.ones(63, dtype=torch.bool)
    untouched[slots] = False
    for x, cache, scale in zip(kv, caches, scales, strict=True):
        values, steps = quantize_heads(x)
        assert torch.equal(cache.flatten(0, 1)[slots], values)
        assert torch.equal(scale.flatten(0, 1)[slots], steps)
        assert (cache.flatten(0, 1)[untouched] == -128).all()
        assert scale.flatten(0, 1)[untouched].isnan().all()


def test_quantization_is_off_by_half_a_step_at_most() -> None:
    x = torch.randn(50, 3, 80) * torch.logspace(-30, 30, 50)[:, None, None]
    x[7, 1] = 0
    values, scales = quantize_heads(x)
    step = scales.double()[..., None]
    assert ((values * step - x.double()).abs() <= step * (0.5 + 1e-5)).all()
    assert (values.abs().amax(-1) == 127).sum() == 50 * 3 - 1
    assert scales[7, 1] == 0


@torch.inference_mode()
def test_a_scale_is_its_heads_own() -> None:
    """Doubling one head's keys and values changes the answers of its group alone."""
    case = make_case([(1, 30)], heads=4, kv_heads=2, cache_dtype=torch.int8)
    assert case.v_scales is not None
    doubled = dataclasses.replace(case, v_scales=case.v_scales * torch.tensor([1.0, 2.0]))
    before, after = (attend(each, torch.empty_like(case.q_THE)) for each in (case, doubled))
    assert torch.equal(after[:, :2], before[:, :2])
    torch.testing.assert_close(after[:, 2:], 2 * before[:, 2:])
