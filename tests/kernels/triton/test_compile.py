"""What torch.compile makes of the public functions when Triton serves: one graph of our operators, nothing broken off.

The tensors are on CPU, where the interpreter runs the operators; that they go to Triton is said by the test.
"""

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import rayllm_kernels as ops
from tests.kernels.paged_cases import make_case

MODULES = [
    "rms_norm",
    "rms_norm_int8",
    "silu_mul",
    "rotary",
    "rotary_store_kv",
    "store_kv",
    "paged_attention",
    "int8_linear",
    "fused_linear_cross_entropy",
]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in MODULES:
        monkeypatch.setattr(sys.modules[f"rayllm_kernels.{name}"], "on_triton", lambda op, x: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., object]) -> tuple[Callable[..., object], list[str]]:
    """-> `function` compiled in one graph, and the names of our operators in it once it has run."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("rayllm."))
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend), seen


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@torch.no_grad()
def test_a_step_is_one_graph_of_our_operators() -> None:
    x, weight = randn(5, 48), randn(48)
    int8 = torch.randint(-127, 128, (24, 48), dtype=torch.int8)
    scale = torch.rand(24, 1)
    cos = randn(5, 16)
    slots = torch.randperm(16)[:5]

    def step(x: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, ...]:
        normed, summed = ops.add_rms_norm(x, x, weight, 1e-5)
        q, q_scale, _ = ops.add_rms_norm_int8(x, x, weight, 1e-5)
        gate = ops.silu_mul(normed, ops.rms_norm(summed, weight, 1e-5))
        heads = gate.view(5, 3, 16)
        rotated = ops.rotary_store_kv(heads[:, :1], heads[:, 1:2], heads[:, 2:], cos, cos, k_cache, v_cache, slots)
        ops.store_kv(heads[:, 1:2], heads[:, 2:], k_cache, v_cache, slots)
        turned, _ = ops.apply_rotary(heads[:, :1], heads[:, 1:2], cos, cos)
        products = ops.w8a8_linear(x, int8, scale), ops.w8a16_linear(x, int8, scale)
        return (*products, rotated, turned, q, q_scale)

    caches = [torch.zeros(4, 4, 1, 16) for _ in range(4)]
    expected = step(x, *caches[:2])
    function, seen = compiled(step)
    for ours, wanted in zip((*function(x, *caches[2:]), *caches[2:]), (*expected, *caches[:2]), strict=True):
        assert torch.equal(ours, wanted)
    for name in (
        "add_rms_norm",
        "add_rms_norm_int8",
        "rms_norm",
        "silu_mul",
        "rotary_store_kv",
        "store_kv",
        "rotary",
        "quantize_rows",
        "w8a8_product",
        "w8a16_product",
    ):
        assert any(f".{name}." in f".{target.removeprefix('rayllm.')}." for target in seen), (name, seen)


@torch.no_grad()
def test_attention_over_pages_is_in_the_graph() -> None:
    case = make_case([(1, 20), (3, 9)], heads=2, kv_heads=1, head_dim=16)

    def attend(q: Tensor) -> Tensor:
        return ops.paged_attention(
            q * 1,
            case.k_cache,
            case.v_cache,
            block_tables_RM=case.block_tables_RM,
            rows_B=case.rows_B,
            query_start_B1=case.query_start_B1,
            context_lens_B=case.context_lens_B,
            scale=case.scale,
            window=None,
        )

    function, seen = compiled(attend)
    case.check(function(case.q_THE))
    assert any("paged_attention" in target for target in seen)


def test_gradients_through_the_graph() -> None:
    x, weight = randn(5, 48).requires_grad_(), randn(48).requires_grad_()
    targets = torch.tensor([1, 0, -100, 46, 47])
    vocabulary = randn(48, 48)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        normed, summed = ops.add_rms_norm(x, x, weight, 1e-5)
        return ops.fused_linear_cross_entropy(ops.silu_mul(normed, summed), vocabulary, targets)

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(whole(x, weight), (x, weight))
    theirs = torch.autograd.grad(loss(x, weight), (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
