"""`silu_mul` in Triton, forward and backward: `torch.ops.rayllm.silu_mul`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.spec import Spec

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def silu_mul_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_pitch: tl.tensor,
    up_pitch: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Program = (row, BLOCK columns). Pitches: elements from one row to the next."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    g = tl.load(gate + row * gate_pitch + column, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_pitch + column, inside, 0.0).to(tl.float32)
    silu = (g * _sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + column, (silu * u).to(out.dtype.element_ty), inside)


@triton.jit
def silu_mul_backward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    dout: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    gate_pitch: tl.tensor,
    up_pitch: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    dense = row * size + column
    g = tl.load(gate + row * gate_pitch + column, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_pitch + column, inside, 0.0).to(tl.float32)
    d = tl.load(dout + dense, inside, 0.0).to(tl.float32)
    sigmoid = _sigmoid(g)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + dense, (d * u * slope).to(dgate.dtype.element_ty), inside)
    tl.store(dup + dense, (d * g * sigmoid).to(dup.dtype.element_ty), inside)


@torch.library.custom_op("rayllm::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """For tensors that `supports` takes."""
    rows, size = gate.shape
    out = torch.empty((rows, size), dtype=gate.dtype, device=gate.device)
    if out.numel() > 0:
        launch_kernel(
            silu_mul_kernel,
            (rows, triton.cdiv(size, _BLOCK)),
            gate,
            up,
            out,
            gate.stride(0),
            up.stride(0),
            size,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return out


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("rayllm::silu_mul_backward", mutates_args=())
def silu_mul_backward(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradients of gate and up."""
    rows, size = gate.shape
    dgate, dup = (torch.empty((rows, size), dtype=gate.dtype, device=gate.device) for _ in range(2))
    if dgate.numel() > 0:
        launch_kernel(
            silu_mul_backward_kernel,
            (rows, triton.cdiv(size, _BLOCK)),
            gate,
            up,
            dout.contiguous(),
            dgate,
            dup,
            gate.stride(0),
            up.stride(0),
            size,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return dgate, dup


@silu_mul_backward.register_fake
def _(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = silu_mul_backward(*ctx.saved_tensors, dout)
    return gradients


silu_mul.register_autograd(_differentiate, setup_context=_save)


def supports(gate: Tensor, up: Tensor) -> bool:
    """Two matrices alike, or column slices of one."""
    return (
        gate.shape == up.shape
        and gate.ndim == 2
        and gate.dtype == up.dtype
        and gate.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and gate.stride(1) == up.stride(1) == 1
    )


def _spec(name: str, kernel: Any, pointers: tuple[str, ...], dtype: str) -> Spec:
    integers = ("gate_pitch", "up_pitch", "size")
    signature = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(integers, "i32") | {"BLOCK": "constexpr"}
    return Spec(
        name=f"{name} {dtype}",
        kernel=kernel,
        signature=signature,
        constexprs={"BLOCK": _BLOCK},
        aligned=(*pointers, *integers),
        num_warps=_WARPS,
        num_stages=3,
        expects=frozenset(),
    )


SPECS = [
    spec
    for dtype in ("bf16", "fp16", "fp32")
    for spec in (
        _spec("silu_mul", silu_mul_kernel, ("gate", "up", "out"), dtype),
        _spec("silu_mul backward", silu_mul_backward_kernel, ("gate", "up", "dout", "dgate", "dup"), dtype),
    )
]
