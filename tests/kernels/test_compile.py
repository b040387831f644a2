"""torch.compile on CPU: one graph of torch's own operations, since it cannot look into the compiled loops."""

import logging

import pytest
import torch
from torch import Tensor

import rayllm_kernels as ops
from rayllm_kernels import dispatch


@torch.no_grad()
def test_public_functions_are_traced_as_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=generator), torch.randn(64, generator=generator)
    int8 = torch.randint(-127, 128, (32, 64), dtype=torch.int8, generator=generator)
    scale, cos, slots = torch.rand(32, 1, generator=generator), torch.randn(5, 32), torch.arange(5)
    k_cache, v_cache = torch.zeros(2, 2, 4, 1, 32)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        normed, summed = ops.add_rms_norm(x, x, weight, 1e-5)
        heads = ops.silu_mul(normed, ops.rms_norm(summed, weight, 1e-5)).view(5, 2, 32)
        q, k = ops.apply_rotary(heads[:, :1], heads[:, 1:], cos, cos)
        ops.store_kv(k, k, k_cache, v_cache, slots)
        return q, ops.linear(x, x), ops.w8a8_linear(x, int8, scale), ops.w8a16_linear(x, int8, scale), k_cache + 0

    torch._dynamo.reset()
    expected = step(x)
    whole = torch.compile(step, fullgraph=True, backend="eager")
    for ours, wanted in zip(whole(x), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_the_choice_is_a_constant_of_the_graph_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """What a call on CUDA asks; here the answer is torch, and why."""
    dispatch._decide.cache_clear()
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, logger="rayllm_kernels.dispatch")
    choose = torch.compile(lambda x: x + 1 if dispatch._has_triton("an op") else x - 1, fullgraph=True, backend="eager")
    for _ in range(2):
        assert choose(torch.zeros(())) == -1
    assert dispatch._has_triton("an op") is False
    (record,) = caplog.records
    assert "an op on CUDA: torch, because torch" in record.getMessage()
    dispatch._decide.cache_clear()
    torch._dynamo.reset()


def test_gradcheck_of_what_trains() -> None:
    """In float64, where the references serve on any device."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, q, k, cos = leaf(3, 5), leaf(5), leaf(3, 2, 4), leaf(3, 1, 4), leaf(3, 4).detach()
    check = torch.autograd.gradcheck
    assert check(lambda x, w: ops.rms_norm(x, w, 1e-5), (x, weight))
    assert check(lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5), (x, leaf(3, 5), weight))
    assert check(ops.silu_mul, (x, leaf(3, 5)))
    assert check(lambda q, k: ops.apply_rotary(q, k, cos, cos), (q, k))
