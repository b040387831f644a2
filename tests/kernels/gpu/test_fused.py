"""The small ops and the loss on a GPU, through their public functions: values and gradients against float64."""

import math

import pytest
import torch
from torch import Tensor

from rayllm_kernels import (
    add_rms_norm,
    add_rms_norm_int8,
    add_rms_norm_int8_reference,
    add_rms_norm_reference,
    apply_rotary,
    apply_rotary_reference,
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_reference,
    quantize_rows,
    rms_norm,
    rms_norm_int8,
    rms_norm_reference,
    rotary_store_kv,
    rotary_store_kv_reference,
    silu_mul,
    silu_mul_reference,
)
from tests.kernels.exactness import DTYPES, compare, randn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = [(1, 576), (17, 80), (333, 1000), (1000, 4096), (5, 8192), (0, 64)]


def gpu(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    return randn(*shape, dtype=dtype, scale=scale, seed=seed, device="cuda")


def angles(tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    phase = gpu(tokens, head_dim // 2, dtype=torch.float32, scale=9.0).repeat(1, 2)
    return phase.cos().to(dtype), phase.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = gpu(*shape, dtype=dtype, scale=3.0), gpu(*shape, dtype=dtype, seed=1)
    weight = gpu(shape[1], dtype=dtype)
    compare(lambda x, w: (rms_norm(x, w, 1e-5),), lambda x, w: (rms_norm_reference(x, w, 1e-5),), [x, weight], dtype)
    compare(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-5),
        [x, residual, weight],
        dtype,
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one() -> None:
    x, weight = (gpu(*shape, dtype=torch.float32).to("cuda:1") for shape in ((17, 576), (576,)))
    assert torch.cuda.current_device() == 0
    normed = rms_norm(x, weight, 1e-5)
    assert normed.device == x.device
    torch.testing.assert_close(normed, rms_norm_reference(x, weight, 1e-5), rtol=1e-6, atol=1e-6)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_norm_is_the_same_every_time(dtype: torch.dtype) -> None:
    x, weight = gpu(3000, 576, dtype=dtype).requires_grad_(), gpu(576, dtype=dtype).requires_grad_()
    first, second = (torch.autograd.grad(rms_norm(x, weight, 1e-5).sum(), (x, weight)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_to_int8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = gpu(*shape, dtype=dtype, scale=3.0), gpu(*shape, dtype=dtype, seed=1)
    weight = gpu(shape[1], dtype=dtype)
    with torch.no_grad():
        q, scale = rms_norm_int8(x, weight, 1e-5)
        added = add_rms_norm_int8(x, residual, weight, 1e-5)
        normed, summed = add_rms_norm(x, residual, weight, 1e-5)
        if shape[0] == 0:
            assert q.shape == shape
            return
        for ours, expected in (
            ((q, scale), quantize_rows(rms_norm(x, weight, 1e-5))),
            (added[:2], quantize_rows(normed)),
        ):
            assert torch.equal(ours[0], expected[0])
            assert torch.equal(ours[1], expected[1])
        assert torch.equal(added[2], summed)
        reference = add_rms_norm_int8_reference(x, residual, weight, 1e-5)
    assert (added[0].int() - reference[0].int()).abs().max() <= 1
    assert (added[0] != reference[0]).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = list(gpu(shape[0], 2 * shape[1], dtype=dtype, scale=4.0).chunk(2, dim=1))
    compare(lambda g, u: (silu_mul(g, u),), lambda g, u: (silu_mul_reference(g, u),), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 9, 3, 64), (77, 32, 8, 128), (5, 4, 4, 80)])
def test_rotary_and_store(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = gpu(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype).split((heads, kv_heads, kv_heads), dim=1)
    cos, sin = angles(tokens, head_dim, dtype)
    compare(
        lambda q, k: apply_rotary(q, k, cos, sin),
        lambda q, k: apply_rotary_reference(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        [q, k],
        dtype,
    )
    slots = torch.randperm(128, device="cuda")[:tokens]
    caches = [torch.full((32, 4, kv_heads, head_dim), math.nan, dtype=dtype, device="cuda") for _ in range(4)]
    with torch.no_grad():
        result = rotary_store_kv(q, k, v, cos, sin, *caches[:2], slots)
        expected = rotary_store_kv_reference(q, k, v, cos, sin, *caches[2:], slots)
    exact = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 0, "equal_nan": True}
    torch.testing.assert_close(result, expected, **exact)
    torch.testing.assert_close(caches[0], caches[2], **exact)
    torch.testing.assert_close(caches[1], caches[3], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(1, 64, 50), (1500, 576, 49152), (700, 128, 128259)])
def test_loss(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
    """The rounding of the logits, of either sign, is in both errors: a small factor more than twice is not allowed."""
    targets = torch.arange(tokens, device="cuda") * 7919 % vocabulary
    targets[1::3] = -100
    results = []
    for loss, wanted in (
        (fused_linear_cross_entropy, dtype),
        (fused_linear_cross_entropy_reference, dtype),
        (fused_linear_cross_entropy_reference, torch.float64),
    ):
        x = gpu(tokens, hidden, dtype=dtype).to(wanted).requires_grad_()
        weight = gpu(vocabulary, hidden, dtype=dtype, scale=0.1).to(wanted).requires_grad_()
        value = loss(x, weight, targets)
        results.append([value, *torch.autograd.grad(value / tokens, (x, weight))])
    for ours, torchs, exact in zip(*results, strict=True):
        allowed = 2 * (torchs.double() - exact).abs().max()
        allowed += (1e-5 if dtype == torch.float32 else 2**-9) * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # which torch itself uses
def test_compiled_whole() -> None:
    """torch.compile sees operators, and no Python that it cannot follow."""
    x, weight = gpu(33, 576, dtype=torch.bfloat16), gpu(576, dtype=torch.bfloat16)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        normed, summed = add_rms_norm(x, x, weight, 1e-5)
        return silu_mul(normed, rms_norm(summed, weight, 1e-5))

    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, weight), layer(x, weight))
    leaf = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(compiled(leaf, weight).float().sum(), leaf)
    (theirs,) = torch.autograd.grad(layer(leaf, weight).float().sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=1e-2)


@torch.inference_mode()
def test_in_a_cuda_graph() -> None:
    x, weight = gpu(33, 576, dtype=torch.bfloat16), gpu(576, dtype=torch.bfloat16)

    def step() -> Tensor:
        q, scale, summed = add_rms_norm_int8(x, x, weight, 1e-5)
        return silu_mul(summed, q * scale.to(x.dtype))

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    x.copy_(gpu(33, 576, dtype=torch.bfloat16, seed=5))
    graph.replay()
    assert torch.equal(out, step())


@torch.inference_mode()
def test_keys_and_values_are_stored_in_a_cuda_graph() -> None:
    q, k, v = (gpu(5, 4, 64, dtype=torch.bfloat16, seed=seed) for seed in (1, 2, 3))
    cos, sin = angles(5, 64, torch.bfloat16)
    slots = torch.tensor([3, 17, 4, 63, 30], device="cuda")
    cache = torch.zeros(2, 4, 16, 4, 64, dtype=torch.bfloat16, device="cuda")

    def step() -> Tensor:
        rotated: Tensor = rotary_store_kv(q, k, v, cos, sin, cache[0], cache[1], slots)
        return rotated

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    slots.copy_(torch.tensor([9, 0, 21, 40, 2], device="cuda"))
    k.copy_(gpu(5, 4, 64, dtype=torch.bfloat16, seed=7))
    cache.zero_()
    graph.replay()
    replayed = cache.clone()
    cache.zero_()
    assert torch.equal(out, step())
    assert torch.equal(replayed, cache)
    assert replayed.any()
