"""`rms_norm` and `add_rms_norm` in Triton, forward and backward: `torch.ops.rayllm.rms_norm`, `.add_rms_norm`.

A program holds whole rows in registers, so that x is read once. The backward pass recomputes 1 / rms instead of keeping
it, and sums the weight's gradient in a fixed order: the same bits in every run.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.spec import Spec

MAX_SIZE = 8192  # from there on the backward pass would spill registers
_NARROWEST = 64  # columns: no model needs the binaries that less would be
_ELEMENTS = 2048  # of a program, at least: small rows share one
_PARTIAL_ROWS = 264  # two programs for each of an H100's processors: rows of the weight's partial gradients


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    summed: tl.tensor,
    rows: tl.tensor,
    pitch: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Program = ROWS rows. x: HEADS rows side by side, then `pitch` elements on the next ones; all else is dense."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_D = tl.arange(0, BLOCK_D)
    inside = (row_R < rows)[:, None] & (column_D < SIZE)[None, :]
    dense = row_R[:, None] * SIZE + column_D[None, :]
    start_R = row_R // HEADS * pitch + row_R % HEADS * SIZE
    x_RD = tl.load(x + start_R[:, None] + column_D[None, :], inside, 0.0).to(tl.float32)
    if ADD:
        x_RD += tl.load(residual + dense, inside, 0.0).to(tl.float32)
        rounded = x_RD.to(summed.dtype.element_ty)
        tl.store(summed + dense, rounded, inside)
        x_RD = rounded.to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / SIZE + eps)
    normed = (x_RD * scale_R[:, None]).to(out.dtype.element_ty).to(tl.float32)
    weight_D = tl.load(weight + column_D, column_D < SIZE, 0.0).to(tl.float32)
    tl.store(out + dense, (weight_D[None, :] * normed).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    dout: tl.tensor,
    dsummed: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Program p = every p-th ROWS rows, and row p of the partial sums `dweight`. All dense."""
    column_D = tl.arange(0, BLOCK_D)
    weight_D = tl.load(weight + column_D, column_D < SIZE, 0.0).to(tl.float32)
    dweight_RD = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row_R = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row_R < rows)[:, None] & (column_D < SIZE)[None, :]
        dense = row_R[:, None] * SIZE + column_D[None, :]
        x_RD = tl.load(x + dense, inside, 0.0).to(tl.float32)
        dout_RD = tl.load(dout + dense, inside, 0.0).to(tl.float32)
        scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / SIZE + eps)
        normed = x_RD * scale_R[:, None]
        dweight_RD += dout_RD * normed.to(x.dtype.element_ty).to(tl.float32)
        dnormed = dout_RD * weight_D[None, :]
        mean_R = tl.sum(dnormed * normed, 1) / SIZE
        dx_RD = scale_R[:, None] * (dnormed - normed * mean_R[:, None])
        if ADD:
            dx_RD += tl.load(dsummed + dense, inside, 0.0).to(tl.float32)
        tl.store(dx + dense, dx_RD.to(dx.dtype.element_ty), inside)
    total_D = tl.sum(dweight_RD, 0)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * SIZE + column_D, total_D, column_D < SIZE)


def norm_tile(size: int) -> dict[str, int]:
    """The compile-time arguments that say which rows and columns a program holds."""
    block = max(triton.next_power_of_2(size), _NARROWEST)
    return {"SIZE": size, "BLOCK_D": block, "ROWS": max(1, _ELEMENTS // block)}


def norm_warps(size: int) -> int:
    """A thread's part of a row is 16 elements."""
    warps: int = max(4, triton.next_power_of_2(size) // 512)
    return warps


def backward_warps(size: int) -> int:
    """With four warps, rows of 512 of float32 spill."""
    return max(8, norm_warps(size))


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> normed, and the sum with the residual, or x where there is none."""
    size = x.shape[-1]
    rows = x.numel() // size
    dense = x.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(out)
    tile = norm_tile(size)
    if rows > 0:
        launch_kernel(
            rms_norm_kernel,
            (triton.cdiv(rows, tile["ROWS"]),),
            x,
            residual,
            weight,
            out,
            None if residual is None else summed,
            rows,
            size if dense else x.stride(0),
            eps,
            HEADS=1 if dense else x.shape[1],
            ADD=residual is not None,
            **tile,
            num_warps=norm_warps(size),
        )
    return out, summed


@torch.library.custom_op("rayllm::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """For tensors that `supports` takes."""
    return _forward(x, None, weight, eps)[0]


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("rayllm::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """For tensors that `supports` takes, x and residual dense and alike."""
    return _forward(x, residual, weight, eps)


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("rayllm::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    x: Tensor, weight: Tensor, dout: Tensor, dsummed: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """-> the gradients of x (to which `dsummed` is added) and of the weight."""
    size = x.shape[-1]
    rows, tile = x.numel() // size, norm_tile(size)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = max(1, min(_PARTIAL_ROWS, triton.cdiv(rows, tile["ROWS"])))
    dweight = torch.empty((programs, size), dtype=torch.float32, device=x.device)
    launch_kernel(
        rms_norm_backward_kernel,
        (programs,),
        x.contiguous(),
        weight,
        dout.contiguous(),
        None if dsummed is None else dsummed.contiguous(),
        dx,
        dweight,
        rows,
        eps,
        ADD=dsummed is not None,
        **tile,
        num_warps=backward_warps(size),
    )
    return dx, dweight.sum(0).to(weight.dtype)


@rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, dout: Tensor, dsummed: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*rms_norm_backward(*ctx.saved_tensors, dout, None, ctx.eps), None)


def _save_sum(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2])
    ctx.eps = inputs[3]


def _differentiate_sum(ctx: Any, dout: Tensor, dsummed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dx, dweight = rms_norm_backward(*ctx.saved_tensors, dout, dsummed, ctx.eps)
    return dx, dx, dweight, None


rms_norm.register_autograd(_differentiate, setup_context=_save)
add_rms_norm.register_autograd(_differentiate_sum, setup_context=_save_sum)


def supports(x: Tensor, weight: Tensor) -> bool:
    """x dense, or heads of a token side by side in a fused product."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.shape[-1] <= MAX_SIZE
        and (x.is_contiguous() or (x.ndim == 3 and x.stride()[1:] == (x.shape[2], 1)))
        and weight.is_contiguous()
    )


def supports_sum(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    return (
        supports(x, weight)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and x.is_contiguous()
        and residual.is_contiguous()
    )


def _spec(size: int, *, dtype: str, add: bool = False, backward: bool = False, heads: int = 1) -> Spec:
    names = ["x", "weight", "dout", "dx"] if backward else ["x", "weight", "out"]
    optional = ["dsummed"] if backward else ["residual", "summed"]
    pointers = dict.fromkeys([*names, *(optional if add else [])], f"*{dtype}")
    pointers |= {"dweight": "*fp32"} if backward else {}
    integers = {"rows": "i32"} if backward else {"rows": "i32", "pitch": "i32"}
    absent: dict[str, object] = {} if add else dict.fromkeys(optional)
    constexprs = absent | norm_tile(size) | {"ADD": add} | ({} if backward else {"HEADS": heads})
    side_by_side = f" of {heads} heads" if heads > 1 else ""
    return Spec(
        name=f"{'add_' if add else ''}rms_norm{' backward' if backward else ''} D{size} {dtype}{side_by_side}",
        kernel=rms_norm_backward_kernel if backward else rms_norm_kernel,
        signature=pointers | integers | {"eps": "fp32"} | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*pointers, *(["pitch"] if "pitch" in integers else [])),
        num_warps=backward_warps(size) if backward else norm_warps(size),
        num_stages=3,
        expects=frozenset(),
    )


# Every tile, filled and not
SIZES = [size for block in (64, 128, 256, 512, 1024, 2048, 4096, MAX_SIZE) for size in (block * 3 // 4, block)]
SPECS = [
    *(
        _spec(size, dtype=dtype, add=add, backward=backward)
        for size, dtype, add, backward in product(SIZES, ("bf16", "fp16", "fp32"), (False, True), (False, True))
    ),
    *(_spec(128, dtype="bf16", heads=heads) for heads in (3, 32)),
]
