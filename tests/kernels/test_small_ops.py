"""rms_norm, rotary and silu_mul against transformers' own layers, their torch references and float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rayllm_kernels import (
    add_rms_norm,
    add_rms_norm_reference,
    apply_rotary,
    apply_rotary_reference,
    rms_norm,
    rms_norm_reference,
    rotary_store_kv,
    silu_mul,
    silu_mul_reference,
)
from tests.kernels.exactness import Op, compare

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 576), (3, 16), (17, 80), (9, 1536), (2, 50)]  # 50: no multiple of the lanes, served by the reference


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def assert_near(result: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 sums: in bfloat16 that may flip a rare rounding, never by more than a step."""
    assert result.dtype == expected.dtype
    if result.dtype == torch.bfloat16:
        assert (result != expected).float().mean() < 2e-3
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=0)
    else:
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype, scale=3.0), randn(shape[1], dtype=dtype)
    theirs = LlamaRMSNorm(shape[1], eps=1e-5).to(dtype)
    theirs.weight.copy_(weight)
    assert_near(rms_norm(x, weight, 1e-5), theirs(x))
    assert_near(rms_norm(x[None], weight, 1e-5), theirs(x)[None])
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, rtol=2**-7, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype)
    residual = randn(*shape, dtype=dtype, scale=5.0).flip(0)
    before = x.clone(), residual.clone()
    normed, summed = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(summed, residual + x)
    assert_near(normed, add_rms_norm_reference(x, residual, weight, 1e-6)[0])
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 4), (7, 3), (9, 1)])
def test_rms_norm_of_heads_within_a_fused_product(tokens: int, heads: int, dtype: torch.dtype) -> None:
    qkv, weight = randn(tokens, heads + 2, 32, dtype=dtype, scale=3.0), randn(32, dtype=dtype)
    part = qkv[:, 1 : 1 + heads]
    result = rms_norm(part, weight, 1e-5)
    assert result.is_contiguous()
    assert torch.equal(result, rms_norm(part.contiguous(), weight, 1e-5))
    assert_near(result, rms_norm_reference(part, weight, 1e-5))


@torch.inference_mode()
def test_rms_norm_of_zeros_and_of_large_values() -> None:
    weight = torch.ones(64)
    assert torch.equal(rms_norm(torch.zeros(2, 64), weight, 1e-5), torch.zeros(2, 64))
    torch.testing.assert_close(rms_norm(torch.full((1, 64), 1e15), weight, 1e-5), torch.ones(1, 64))
    assert rms_norm(torch.full((1, 64), torch.nan), weight, 1e-5).isnan().all()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 20, 32])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(1, 9, 3), (33, 4, 4), (5, 5, 1)])
def test_rotary(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, _ = qkv.split((heads, kv_heads, kv_heads), dim=1)  # views of one product, as in a fused projection
    angles = randn(tokens, head_dim // 2, dtype=torch.float32, scale=9.0).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    results = apply_rotary(q, k, cos, sin)
    expected = apply_rotary_pos_emb(
        q.transpose(0, 1)[None].float(), k.transpose(0, 1)[None].float(), cos[None].float(), sin[None].float()
    )
    for result, reference, theirs in zip(results, apply_rotary_reference(q, k, cos, sin), expected, strict=True):
        assert result.is_contiguous() or head_dim % 32 != 0
        torch.testing.assert_close(result, reference, rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-6)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(result.float(), theirs[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 20])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(1, 9, 3), (33, 4, 4), (5, 5, 1)])
def test_rotary_store_kv(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    page, blocks = 4, 12
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    before = qkv.clone()
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = randn(tokens, head_dim // 2, dtype=torch.float32, scale=9.0).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k_cache, v_cache = (torch.full((blocks, page, kv_heads, head_dim), torch.nan, dtype=cache_dtype) for _ in range(2))
    slots = torch.randperm(blocks * page, generator=torch.Generator().manual_seed(0))[:tokens]
    result = rotary_store_kv(q, k, v, cos, sin, k_cache, v_cache, slots)
    q_rotated, k_rotated = apply_rotary_reference(q, k, cos, sin)
    torch.testing.assert_close(result, q_rotated, rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-6)
    atol = 0 if cache_dtype == dtype == torch.bfloat16 else 1e-6 if cache_dtype == torch.float32 else 2**-7
    torch.testing.assert_close(k_cache.flatten(0, 1)[slots], k_rotated.to(cache_dtype), rtol=0, atol=atol)
    assert torch.equal(v_cache.flatten(0, 1)[slots], v.to(cache_dtype))
    untouched = torch.ones(blocks * page, dtype=torch.bool)
    untouched[slots] = False
    assert k_cache.flatten(0, 1)[untouched].isnan().all()
    assert v_cache.flatten(0, 1)[untouched].isnan().all()
    assert torch.equal(qkv, before)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1536), (3, 16), (40, 528), (2, 50)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    joined = randn(shape[0], 2 * shape[1], dtype=dtype, scale=8.0)
    gate, up = joined.chunk(2, dim=1)  # column slices of one matrix
    assert_near(silu_mul(gate, up), silu_mul_reference(gate, up))
    assert_near(silu_mul(gate.contiguous(), up), silu_mul_reference(gate, up))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_at_the_ends(dtype: torch.dtype) -> None:
    gate = torch.tensor([-torch.inf, -3e38, -200, -88, -0.0, 0.0, 88, 200, 3e38, torch.nan] * 8, dtype=dtype)[None]
    result = silu_mul(gate, torch.ones_like(gate))
    expected = torch.nn.functional.silu(gate)
    finite = gate.isfinite()
    torch.testing.assert_close(result[finite], expected[finite], rtol=2**-7, atol=1e-30)
    assert result[gate.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 64)])
def test_gradients_of_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = (randn(*shape, dtype=torch.float32, scale=scale) for scale in (3.0, 5.0))
    weight = randn(shape[1], dtype=torch.float32)
    compare(lambda *t: (rms_norm(*t, 1e-5),), lambda *t: (rms_norm_reference(*t, 1e-5),), [x, weight], dtype)
    compare(
        lambda *t: add_rms_norm(*t, 1e-6),
        lambda *t: add_rms_norm_reference(*t, 1e-6),
        [x, residual.flip(0), weight],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rms_norm_of_heads_within_a_fused_product(dtype: torch.dtype) -> None:
    compare(
        lambda qkv, weight: (rms_norm(qkv[:, 1:4], weight, 1e-5),),
        lambda qkv, weight: (rms_norm_reference(qkv[:, 1:4], weight, 1e-5),),
        [randn(23, 5, 32, dtype=torch.float32, scale=3.0), randn(32, dtype=torch.float32)],
        dtype,
    )


def test_gradient_of_rms_norm_of_zeros_and_of_large_values() -> None:
    weight = torch.ones(64, requires_grad=True)
    for value in (0.0, 1e15, 1e-15):
        x = torch.full((1, 64), value, requires_grad=True)
        upstream = randn(1, 64, dtype=torch.float32)
        ours = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), upstream)
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        exact = torch.autograd.grad(rms_norm_reference(*wide, 1e-5), wide, upstream.double())
        for mine, wanted in zip(ours, exact, strict=True):
            scale = float(upstream.abs().max()) / max(value, 1e-5**0.5)
            torch.testing.assert_close(
                mine.double(), wanted, rtol=1e-5, atol=1e-6 * max(scale, float(wanted.abs().max()))
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 20])
def test_gradients_of_rotary(head_dim: int, dtype: torch.dtype) -> None:
    angles = randn(7, head_dim // 2, dtype=torch.float32, scale=9.0).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def of_a_fused_product(rotate: Callable[..., tuple[Tensor, ...]]) -> Op:
        def op(qkv: Tensor) -> tuple[Tensor, ...]:
            q, k, _ = qkv.split((4, 2, 2), dim=1)
            return rotate(q, k, cos.to(qkv.dtype), sin.to(qkv.dtype))

        return op

    ours, reference = of_a_fused_product(apply_rotary), of_a_fused_product(apply_rotary_reference)
    compare(ours, reference, [randn(7, 8, head_dim, dtype=torch.float32)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1536), (3, 16), (40, 528), (2, 50)])
def test_gradients_of_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    joined = randn(shape[0], 2 * shape[1], dtype=torch.float32, scale=4.0)
    compare(
        lambda x: (silu_mul(*x.chunk(2, dim=1)),), lambda x: (silu_mul_reference(*x.chunk(2, dim=1)),), [joined], dtype
    )


def test_gradients_by_gradcheck() -> None:
    """In float64, which the references serve."""
    x, y = (randn(3, 32, dtype=torch.float64, scale=2.0).flip(i).requires_grad_() for i in range(2))
    weight, cos = torch.ones(32, dtype=torch.float64, requires_grad=True), randn(3, 32, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, 1e-5), (x, y, weight))
    assert torch.autograd.gradcheck(silu_mul, (x, y))
    assert torch.autograd.gradcheck(lambda q, k: apply_rotary(q[:, None], k[:, None], cos, cos), (x, y))


def test_a_sum_whose_norm_or_whose_rest_is_not_used() -> None:
    x, residual, weight = randn(3, 64, dtype=torch.float32), randn(3, 64, dtype=torch.float32), torch.ones(64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(add_rms_norm(leaf, residual, weight, 1e-5)[1].sum(), leaf)
    assert torch.equal(gradient, torch.ones_like(x))
    (gradient,) = torch.autograd.grad(add_rms_norm(leaf, residual, weight, 1e-5)[0].sum(), leaf)
    (expected,) = torch.autograd.grad(add_rms_norm_reference(leaf, residual, weight, 1e-5)[0].sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    x, weight = randn(500, 64, dtype=torch.float32).requires_grad_(), torch.ones(64, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), (x, weight)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
