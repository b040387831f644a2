"""store_kv by Triton's interpreter: equal bits with torch, and not a byte beside the slots."""

import math

import pytest
import torch
from torch import Tensor

from rayllm_kernels import store_kv_reference
from rayllm_kernels.gpu import store_kv as op  # its registration

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def empty_caches(kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    poison = -128 if dtype == torch.int8 else math.nan
    caches = [torch.full((9, 7, kv_heads, head_dim), poison, dtype=dtype) for _ in range(2)]
    quantized = dtype == torch.int8
    return caches, [torch.full((9, 7, kv_heads), math.nan) if quantized else None for _ in range(2)]


@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim"), [(1, 1, 64), (5, 3, 80), (0, 2, 16)])
def test_equals_torch(tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    qkv = torch.randn(tokens, 4 * kv_heads, head_dim).to(dtype)
    k, v = qkv[:, 2 * kv_heads : 3 * kv_heads], qkv[:, 3 * kv_heads :]
    k[:1, :1] = 0  # a head without a largest value
    slots = torch.randperm(63)[:tokens]
    (caches, scales), (expected, expected_scales) = (empty_caches(kv_heads, head_dim, cache_dtype) for _ in range(2))
    torch.ops.rayllm.store_kv(k, v, *caches, slots, *scales)
    store_kv_reference(k, v, *expected, slots, *expected_scales)
    for result, wanted in zip([*caches, *scales], [*expected, *expected_scales], strict=True):
        if result is not None and wanted is not None:
            torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]).view(1, 1, 8)
    (caches, scales) = empty_caches(1, 8, torch.int8)
    torch.ops.rayllm.store_kv(x, x, *caches, torch.tensor([10]), *scales)
    assert caches[0].flatten(0, 1)[10, 0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8])
def test_op(cache_dtype: torch.dtype) -> None:
    caches, scales = empty_caches(2, 16, cache_dtype)
    caches = [cache.zero_() for cache in caches]
    scales = [None if scale is None else scale.zero_() for scale in scales]
    k, v = torch.randn(2, 3, 2, 16)
    torch.library.opcheck(torch.ops.rayllm.store_kv, (k, v, *caches, torch.tensor([5, 9, 0]), *scales))


def test_supports() -> None:
    (k_cache, v_cache), _ = empty_caches(2, 16, torch.int8)
    x, slots = torch.randn(3, 2, 16), torch.arange(3)
    assert op.supports(x, x, k_cache, v_cache, slots)
    assert not op.supports(x.transpose(0, 1), x, k_cache, v_cache, slots)
    assert not op.supports(x, x, k_cache[:, ::2], v_cache, slots)
    assert not op.supports(x, x, k_cache.float(), v_cache, slots)
