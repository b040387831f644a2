"""Root mean square norm (Zhang and Sennrich 2019), alone or after adding to the residual stream.

Numerically transformers' `LlamaRMSNorm`: statistics in float32, and below float32 the normalised value is rounded to
x's dtype before the weight is applied.
"""

import math

import numpy as np
import torch
from torch import Tensor

from rayllm_kernels.dispatch import loops_may_run, on_triton
from rayllm_kernels.native import Kernel, empty, integer, next_task, real
from rayllm_kernels.simd import (
    LANES,
    add,
    broadcast,
    fma,
    load,
    load_bf16,
    mul,
    round_bf16,
    store,
    store_bf16,
    sum_lanes,
)


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The contract of `rms_norm` in plain torch, on any device and under autograd."""
    wide = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


def add_rms_norm_reference(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The contract of `add_rms_norm` in plain torch, on any device and under autograd."""
    summed = residual_TD + x_TD
    return rms_norm_reference(summed, weight_D, eps), summed


_ROWS_PER_TASK = 8


def _norm_rows(block: int) -> None:
    """Kernel: task = some rows. `residual` 0: none; else its sum with x goes to `summed` and is normalised.

    x may be `heads` rows side by side, then `pitch` elements on the next ones; all else is contiguous.
    """
    x, residual, weight, out, summed = (
        integer(block, 0),
        integer(block, 1),
        integer(block, 2),
        integer(block, 3),
        integer(block, 4),
    )
    rows, size, is_bf16 = integer(block, 5), integer(block, 6), integer(block, 7)
    heads, pitch, eps = integer(block, 8), integer(block, 9), real(block, 10)
    item = 2 if is_bf16 else 4
    task = next_task(block)
    while task >= 0:
        for row in range(task * _ROWS_PER_TASK, min(rows, (task + 1) * _ROWS_PER_TASK)):
            start = row * size * item
            source = x + (row // heads * pitch + row % heads * size) * item
            squares = broadcast(np.float32(0.0))
            for i in range(0, size * item, LANES * item):
                value = load_bf16(source + i) if is_bf16 else load(source + i)
                if residual != 0:
                    value = add(value, load_bf16(residual + start + i) if is_bf16 else load(residual + start + i))
                    if is_bf16:
                        value = round_bf16(value)
                        store_bf16(summed + start + i, value)
                    else:
                        store(summed + start + i, value)
                squares = fma(value, value, squares)
            scale = broadcast(np.float32(1.0 / math.sqrt(sum_lanes(squares) / size + eps)))
            if residual != 0:
                source = summed + start
            for i in range(0, size * item, LANES * item):
                if is_bf16:
                    normed = round_bf16(mul(load_bf16(source + i), scale))
                    store_bf16(out + start + i, mul(load_bf16(weight + i), normed))
                else:
                    normed = mul(load(source + i), scale)
                    store(out + start + i, mul(load(weight + i), normed))
        task = next_task(block)


_norm_rows_kernel = Kernel(_norm_rows, integers=10, reals=1, parallel_from=2)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; any leading dimensions. Heads may be a slice of a fused product."""
    if on_triton("rms_norm", x_TD):
        from rayllm_kernels.gpu import rms_norm as gpu

        if gpu.supports(x_TD, weight_D):
            normed: Tensor = gpu.rms_norm(x_TD, weight_D, eps)
            return normed
    if not _compiled(x_TD, weight_D):
        return rms_norm_reference(x_TD, weight_D, eps)
    return _run(x_TD, None, weight_D, eps)[0]


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(residual + x), residual + x), in one pass."""
    if on_triton("add_rms_norm", x_TD):
        from rayllm_kernels.gpu import rms_norm as gpu

        if gpu.supports_sum(x_TD, residual_TD, weight_D):
            both: tuple[Tensor, Tensor] = gpu.add_rms_norm(x_TD, residual_TD, weight_D, eps)
            return both
    if not (
        _compiled(x_TD, weight_D)
        and x_TD.is_contiguous()
        and residual_TD.dtype == x_TD.dtype
        and residual_TD.is_contiguous()
    ):
        return add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)
    return _run(x_TD, residual_TD, weight_D, eps)


def _compiled(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel takes these tensors."""
    return (
        loops_may_run(x)
        and (x.dtype == torch.bfloat16 or x.dtype == torch.float32)
        and x.dtype == weight.dtype
        and x.shape[-1] % LANES == 0
        and (x.is_contiguous() or (x.ndim == 3 and x.stride()[1:] == (x.shape[2], 1)))
        and weight.is_contiguous()
    )


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, size = empty(x.shape, x), x.shape[-1]
    summed = x if residual is None else empty(x.shape, x)
    rows = x.numel() // size
    _norm_rows_kernel(
        -(-rows // _ROWS_PER_TASK),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        summed.data_ptr(),
        rows,
        size,
        x.dtype == torch.bfloat16,
        1 if x.is_contiguous() else x.shape[1],
        size if x.is_contiguous() else x.stride(0),
        eps,
    )
    return out, summed
