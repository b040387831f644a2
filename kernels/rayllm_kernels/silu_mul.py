"""silu(gate) * up, the gate of a SwiGLU feed-forward layer (Shazeer 2020).

Below float32, silu is computed in float32 and rounded before the product, as torch does.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rayllm_kernels.dispatch import loops_may_run, on_triton, readable
from rayllm_kernels.native import Kernel, empty, integer, next_task
from rayllm_kernels.simd import (
    LANES,
    add,
    broadcast,
    div,
    exp,
    fma,
    load,
    load_bf16,
    mul,
    round_bf16,
    store,
    store_bf16,
    sub,
)


def silu_mul_reference(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """The contract of `silu_mul` in plain torch, on any device and under autograd."""
    return F.silu(gate_TF) * up_TF


_COLUMNS_PER_TASK = 512


def _gate_rows(block: int) -> None:
    """Kernel: task = (row, some columns)."""
    gate, up, out, size = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    gate_pitch, up_pitch, is_bf16 = integer(block, 4), integer(block, 5), integer(block, 6)
    parts = (size + _COLUMNS_PER_TASK - 1) // _COLUMNS_PER_TASK
    zero, one = broadcast(np.float32(0.0)), broadcast(np.float32(1.0))
    item = 2 if is_bf16 else 4
    task = next_task(block)
    while task >= 0:
        row, first = task // parts, task % parts * _COLUMNS_PER_TASK
        g, u, o = gate + row * gate_pitch * item, up + row * up_pitch * item, out + row * size * item
        for i in range(first * item, min(size, first + _COLUMNS_PER_TASK) * item, LANES * item):
            x = load_bf16(g + i) if is_bf16 else load(g + i)
            silu = div(x, add(one, exp(sub(zero, x))))
            if is_bf16:
                store_bf16(o + i, mul(round_bf16(silu), load_bf16(u + i)))
            else:
                store(o + i, mul(silu, load(u + i)))
        task = next_task(block)


_gate_rows_kernel = Kernel(_gate_rows, integers=7, parallel_from=16)


def _gate_gradients(block: int) -> None:
    """Kernel: task = (row, some columns). Gradients are contiguous."""
    gate, up, dout, size = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    gate_pitch, up_pitch, is_bf16 = integer(block, 4), integer(block, 5), integer(block, 6)
    dgate, dup = integer(block, 7), integer(block, 8)
    parts = (size + _COLUMNS_PER_TASK - 1) // _COLUMNS_PER_TASK
    zero, one = broadcast(np.float32(0.0)), broadcast(np.float32(1.0))
    item = 2 if is_bf16 else 4
    task = next_task(block)
    while task >= 0:
        row, first = task // parts, task % parts * _COLUMNS_PER_TASK
        g, u, start = gate + row * gate_pitch * item, up + row * up_pitch * item, row * size * item
        for i in range(first * item, min(size, first + _COLUMNS_PER_TASK) * item, LANES * item):
            x = load_bf16(g + i) if is_bf16 else load(g + i)
            y = load_bf16(u + i) if is_bf16 else load(u + i)
            d = load_bf16(dout + start + i) if is_bf16 else load(dout + start + i)
            sigmoid = div(one, add(one, exp(sub(zero, x))))
            slope = mul(sigmoid, fma(x, sub(one, sigmoid), one))
            if is_bf16:
                store_bf16(dgate + start + i, mul(mul(d, y), slope))
                store_bf16(dup + start + i, mul(d, mul(x, sigmoid)))
            else:
                store(dgate + start + i, mul(mul(d, y), slope))
                store(dup + start + i, mul(d, mul(x, sigmoid)))
        task = next_task(block)


_gate_gradients_kernel = Kernel(_gate_gradients, integers=9, parallel_from=16)


def silu_mul(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up, contiguous; gate and up may be column slices of one matrix."""
    if on_triton("silu_mul", gate_TF):
        from rayllm_kernels.gpu import silu_mul as gpu

        if gpu.supports(gate_TF, up_TF):
            product: Tensor = gpu.silu_mul(gate_TF, up_TF)
            return product
    if not (_compiled(gate_TF) and _compiled(up_TF) and gate_TF.dtype == up_TF.dtype):
        return silu_mul_reference(gate_TF, up_TF)
    if not torch.is_grad_enabled():
        return _run(gate_TF, up_TF)
    differentiable: Tensor = _SiluMul.apply(gate_TF, up_TF)  # type: ignore[no-untyped-call]
    return differentiable


def _run(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    rows, size = gate_TF.shape
    out = empty((rows, size), gate_TF)
    _gate_rows_kernel(
        rows * -(-size // _COLUMNS_PER_TASK),
        gate_TF.data_ptr(),
        up_TF.data_ptr(),
        out.data_ptr(),
        size,
        gate_TF.stride(0),
        up_TF.stride(0),
        gate_TF.dtype == torch.bfloat16,
    )
    return out


def _compiled(x: Tensor) -> bool:
    """Whether the compiled kernel takes this tensor."""
    return (
        loops_may_run(x)
        and (x.dtype == torch.bfloat16 or x.dtype == torch.float32)
        and x.ndim == 2
        and x.shape[1] % LANES == 0
        and x.stride(1) == 1
    )


class _SiluMul(torch.autograd.Function):
    """Keeps gate and up, and nothing that is as large as they are beside them."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return _run(gate_TF, up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF = ctx.saved_tensors
        rows, size = gate_TF.shape
        dout_TF = readable(dout_TF)
        dgate_TF, dup_TF = empty((rows, size), gate_TF), empty((rows, size), up_TF)
        _gate_gradients_kernel(
            rows * -(-size // _COLUMNS_PER_TASK),
            gate_TF.data_ptr(),
            up_TF.data_ptr(),
            dout_TF.data_ptr(),
            size,
            gate_TF.stride(0),
            up_TF.stride(0),
            gate_TF.dtype == torch.bfloat16,
            dgate_TF.data_ptr(),
            dup_TF.data_ptr(),
        )
        return dgate_TF, dup_TF
