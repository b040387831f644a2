"""As exact as torch: the rule by which kernels are compared with torch in their own precision and in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

Op = Callable[..., tuple[Tensor, ...]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """FlashAttention's rule: at most twice the error of the same maths by torch, and a little."""
    assert ours.shape == exact.shape
    assert ours.dtype == torchs.dtype
    allowed = 2 * (torchs.double() - exact).abs().max() + ATOL[ours.dtype] * max(1.0, exact.abs().max().item())
    assert (ours.double() - exact).abs().max() <= allowed


def run(op: Op, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """-> the outputs of `op` in `dtype`, and its gradients for random ones of the outputs."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = op(*leaves)
    weights = [randn(*y.shape, dtype=torch.bfloat16, seed=7 + i).to(y.device, dtype) for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def compare(ours: Op, reference: Op, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Outputs and gradients of `ours` against those of `reference`, in `dtype` and in float64."""
    results = (run(ours, inputs, dtype), run(reference, inputs, dtype), run(reference, inputs, torch.float64))
    for triple in zip(*results, strict=True):
        assert_as_exact_as_torch(*triple)
