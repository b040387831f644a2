"""Root mean square norm (Zhang and Sennrich 2019), alone or after adding to the residual stream.

Numerically transformers' `LlamaRMSNorm`: statistics in float32, and below float32 the normalised value is rounded to
x's dtype before the weight is applied.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayllm_kernels.dispatch import loops_may_run, on_triton, readable
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
    sub,
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
_ROWS_PER_SUM = 32


def _norm_gradients(block: int) -> None:
    """Kernel: task = some rows, with x laid out as in `_norm_rows`. `dsummed` 0: none; else it is added to dx. Each
    task's part of the weight's gradient goes into a row of `dweights`, float32."""
    x, weight, dout, dsummed = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    dx, dweights, rows, size = integer(block, 4), integer(block, 5), integer(block, 6), integer(block, 7)
    heads, pitch, is_bf16, eps = integer(block, 8), integer(block, 9), integer(block, 10), real(block, 11)
    item = 2 if is_bf16 else 4
    zero = broadcast(np.float32(0.0))
    task = next_task(block)
    while task >= 0:
        part = dweights + task * size * 4
        for i in range(0, size * 4, LANES * 4):
            store(part + i, zero)
        for row in range(task * _ROWS_PER_SUM, min(rows, (task + 1) * _ROWS_PER_SUM)):
            start = row * size * item
            source = x + (row // heads * pitch + row % heads * size) * item
            squares, dots = zero, zero
            for i in range(0, size * item, LANES * item):
                value = load_bf16(source + i) if is_bf16 else load(source + i)
                w = load_bf16(weight + i) if is_bf16 else load(weight + i)
                d = load_bf16(dout + start + i) if is_bf16 else load(dout + start + i)
                squares = fma(value, value, squares)
                dots = fma(mul(d, w), value, dots)
            inverse = 1.0 / math.sqrt(sum_lanes(squares) / size + eps)
            scale = broadcast(np.float32(inverse))
            shrink = broadcast(np.float32(inverse * sum_lanes(dots) / size * inverse * inverse))
            for i in range(0, size * item, LANES * item):
                value = load_bf16(source + i) if is_bf16 else load(source + i)
                w = load_bf16(weight + i) if is_bf16 else load(weight + i)
                d = load_bf16(dout + start + i) if is_bf16 else load(dout + start + i)
                gradient = sub(mul(mul(d, w), scale), mul(shrink, value))
                if dsummed != 0:
                    other = load_bf16(dsummed + start + i) if is_bf16 else load(dsummed + start + i)
                    gradient = add(gradient, other)
                normed = mul(value, scale)
                if is_bf16:
                    store_bf16(dx + start + i, gradient)
                    normed = round_bf16(normed)
                else:
                    store(dx + start + i, gradient)
                total = part + i // item * 4
                store(total, fma(d, normed, load(total)))
        task = next_task(block)


_norm_gradients_kernel = Kernel(_norm_gradients, integers=11, reals=1, parallel_from=2)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; any leading dimensions. Heads may be a slice of a fused product."""
    if on_triton("rms_norm", x_TD):
        from rayllm_kernels.gpu import rms_norm as gpu

        if gpu.supports(x_TD, weight_D):
            normed: Tensor = gpu.rms_norm(x_TD, weight_D, eps)
            return normed
    if not _compiled(x_TD, weight_D):
        return rms_norm_reference(x_TD, weight_D, eps)
    if not torch.is_grad_enabled():
        return _run(x_TD, None, weight_D, eps)[0]
    differentiable: Tensor = _RmsNorm.apply(x_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return differentiable


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
        and loops_may_run(residual_TD)
        and residual_TD.dtype == x_TD.dtype
        and residual_TD.is_contiguous()
    ):
        return add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)
    if not torch.is_grad_enabled():
        return _run(x_TD, residual_TD, weight_D, eps)
    out_TD, summed_TD = _AddRmsNorm.apply(x_TD, residual_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return out_TD, summed_TD


def _compiled(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel takes these tensors."""
    return (
        loops_may_run(x)
        and loops_may_run(weight)
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
        *_layout(x),
        eps,
    )
    return out, summed


def _layout(x: Tensor) -> tuple[int, int]:
    """-> rows side by side, and elements from those to the next ones."""
    return (1, x.shape[-1]) if x.is_contiguous() else (x.shape[1], x.stride(0))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _run(x, None, weight, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *_gradients(x, weight, dout, None, ctx.eps), None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, summed = _run(x, residual, weight, eps)
        ctx.save_for_backward(summed, weight)
        ctx.eps = eps
        return out, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dsummed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        summed, weight = ctx.saved_tensors
        dx, dweight = _gradients(summed, weight, dout, dsummed, ctx.eps)
        return dx, dx, dweight, None


def _gradients(x: Tensor, weight: Tensor, dout: Tensor, dsummed: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """-> those of x, contiguous, and of the weight."""
    size = x.shape[-1]
    rows = x.numel() // size
    tasks = -(-rows // _ROWS_PER_SUM)
    dx, dweights = empty(x.shape, x), torch.empty(tasks, size)
    dout, dsummed = readable(dout), None if dsummed is None else readable(dsummed)
    _norm_gradients_kernel(
        tasks,
        x.data_ptr(),
        weight.data_ptr(),
        dout.data_ptr(),
        0 if dsummed is None else dsummed.data_ptr(),
        dx.data_ptr(),
        dweights.data_ptr(),
        rows,
        size,
        *_layout(x),
        x.dtype == torch.bfloat16,
        eps,
    )
    return dx, dweights.sum(0).to(weight.dtype)
