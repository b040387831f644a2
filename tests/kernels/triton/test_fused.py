"""The fused kernels under Triton's interpreter, forward and gradients, against float64 and torch's own precision."""

import pytest
import torch

from rayllm_kernels import (
    add_rms_norm_reference,
    apply_rotary_reference,
    rms_norm_reference,
    rotary_store_kv_reference,
    silu_mul_reference,
)
from rayllm_kernels.fused_linear_cross_entropy import _losses
from rayllm_kernels.gpu import rms_norm as gpu_norm
from rayllm_kernels.gpu import rotary as gpu_rotary
from rayllm_kernels.gpu import silu_mul as gpu_silu
from rayllm_kernels.gpu.cross_entropy import losses_and_gradients
from rayllm_kernels.gpu.rotary_store_kv import rotary_store_kv
from tests.kernels.exactness import DTYPES, assert_as_exact_as_torch, compare, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (3, 16), (17, 80), (2, 50), (600, 3), (2, 3, 32), (1, 4100)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [randn(*shape, dtype=dtype, scale=3.0), randn(shape[-1], dtype=dtype)]
    compare(
        lambda x, w: (gpu_norm.rms_norm(x, w, 1e-5),), lambda x, w: (rms_norm_reference(x, w, 1e-5),), inputs, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (17, 80), (2, 50)])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = [randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, scale=5.0, seed=1), randn(shape[1], dtype=dtype)]
    compare(
        lambda x, r, w: gpu_norm.add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-6),
        inputs,
        dtype,
    )
    assert torch.equal(gpu_norm.add_rms_norm(*inputs, 1e-6)[1], inputs[1] + inputs[0])


def test_rms_norm_of_heads_in_a_fused_product_reads_nothing_else() -> None:
    qkv, weight = torch.full((5, 6, 24), torch.nan), randn(24, dtype=torch.float32)
    part = qkv[:, 1:4]
    part.copy_(randn(5, 3, 24, dtype=torch.float32))
    assert gpu_norm.supports(part, weight)
    result = gpu_norm.rms_norm(part, weight, 1e-5)
    torch.testing.assert_close(result, rms_norm_reference(part, weight, 1e-5), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 9, 3, 64), (7, 4, 4, 80), (5, 5, 1, 20)])
def test_rotary(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    angles = randn(tokens, head_dim // 2, dtype=torch.float32, scale=9.0).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    inputs = list(qkv.split((heads, kv_heads, kv_heads), dim=1)[:2])
    compare(
        lambda q, k: gpu_rotary.rotary(q, k, cos, sin, False),
        lambda q, k: apply_rotary_reference(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        inputs,
        dtype,
    )


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 9, 3, 64), (7, 4, 4, 80), (5, 5, 1, 20)])
def test_rotary_store_kv(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype).split((heads, kv_heads, kv_heads), dim=1)
    angles = randn(tokens, head_dim // 2, dtype=torch.float32, scale=9.0).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:tokens]
    caches = [torch.full((8, 4, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(4)]
    result = rotary_store_kv(q, k, v, cos, sin, *caches[:2], slots)
    expected = rotary_store_kv_reference(q, k, v, cos, sin, *caches[2:], slots)
    for a, b in ((result, expected), (caches[0], caches[2]), (caches[1], caches[3])):
        tolerance = 0 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1536), (3, 17), (2, 1025)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = list(randn(shape[0], 2 * shape[1], dtype=dtype, scale=4.0).chunk(2, dim=1))
    compare(
        lambda gate, up: (gpu_silu.silu_mul(gate, up),),
        lambda gate, up: (silu_mul_reference(gate, up),),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 97), (3, 4096), (2, 5001)])
def test_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = randn(rows, vocabulary, dtype=dtype, scale=6.0)
    targets = torch.arange(rows) * 7919 % vocabulary
    exact, torchs, ours = logits.double(), logits.clone(), logits.clone()
    results = (
        losses_and_gradients(ours, targets, -100),
        _losses(torchs, targets, -100),
        _losses(exact, targets, -100),
    )
    assert_as_exact_as_torch(*results)
    assert_as_exact_as_torch(ours, torchs, exact)


def test_ignored_rows_give_zeros_whatever_they_hold() -> None:
    logits = randn(4, 37, dtype=torch.float32)
    logits[[1, 3]] = torch.nan
    losses = losses_and_gradients(logits, torch.tensor([5, -100, 36, -100]), -100)
    assert losses[[1, 3]].tolist() == [0, 0]
    assert logits[[1, 3]].abs().sum() == 0
    assert losses.isfinite().all()
    torch.testing.assert_close(logits.sum(1), torch.zeros(4), rtol=0, atol=1e-5)


def test_operators_are_registered_as_torch_asks() -> None:
    """opcheck: schema, fake kernel, autograd registration, and tracing with dynamic shapes."""
    x, weight = randn(3, 48, dtype=torch.float32), randn(48, dtype=torch.float32)
    q, k, v, angles = (randn(3, n, 16, dtype=torch.float32) for n in (4, 2, 2, 1))
    caches, slots = [torch.zeros(2, 4, 2, 16) for _ in range(2)], torch.tensor([5, 2, 0])
    for operator, arguments in (
        (gpu_norm.rms_norm, (x.requires_grad_(), weight.requires_grad_(), 1e-5)),
        (gpu_norm.add_rms_norm, (x, x.detach().clone().requires_grad_(), weight, 1e-5)),
        (gpu_silu.silu_mul, (x, x.detach().clone().requires_grad_())),
        (gpu_rotary.rotary, (q.requires_grad_(), k.requires_grad_(), angles[:, 0], angles[:, 0], False)),
        (rotary_store_kv, (q.detach(), k.detach(), v, angles[:, 0], angles[:, 0], *caches, slots)),
    ):
        torch.library.opcheck(operator, arguments)
