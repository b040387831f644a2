"""`rms_norm_int8` and `add_rms_norm_int8` in Triton: `torch.ops.rayllm.rms_norm_int8`, `.add_rms_norm_int8`.

Tiles and order of summation are those of `rms_norm`, and the rounding is that of `quantize_rows`: the same bits as the
two one after the other.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.gpu import rms_norm
from rayllm_kernels.gpu.int8_linear_kernels import largest_magnitude, to_int8
from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.rms_norm import norm_tile, norm_warps
from rayllm_kernels.gpu.spec import Spec


@triton.jit(do_not_specialize=["rows"])
def rms_norm_int8_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    q: tl.tensor,
    scales: tl.tensor,
    summed: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Program = ROWS rows. All dense."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_D = tl.arange(0, BLOCK_D)
    inside = (row_R < rows)[:, None] & (column_D < SIZE)[None, :]
    dense = row_R[:, None] * SIZE + column_D[None, :]
    x_RD = tl.load(x + dense, inside, 0.0).to(tl.float32)
    if ADD:
        x_RD += tl.load(residual + dense, inside, 0.0).to(tl.float32)
        rounded = x_RD.to(summed.dtype.element_ty)
        tl.store(summed + dense, rounded, inside)
        x_RD = rounded.to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / SIZE + eps)
    normed = (x_RD * scale_R[:, None]).to(x.dtype.element_ty).to(tl.float32)
    weight_D = tl.load(weight + column_D, column_D < SIZE, 0.0).to(tl.float32)
    normed = (weight_D[None, :] * normed).to(x.dtype.element_ty).to(tl.float32)
    bound_R = largest_magnitude(normed, 1)
    tl.store(q + dense, to_int8(normed, bound_R[:, None]), inside)
    tl.store(scales + row_R, bound_R / 127.0, row_R < rows)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> integers, scales, and the sum with the residual, or x where there is none."""
    rows, size = x.shape
    q, scales = x.new_empty(x.shape, dtype=torch.int8), x.new_empty((rows, 1), dtype=torch.float32)
    summed = x if residual is None else torch.empty_like(x)
    tile = norm_tile(size)
    if rows > 0:
        launch_kernel(
            rms_norm_int8_kernel,
            (triton.cdiv(rows, tile["ROWS"]),),
            x,
            residual,
            weight,
            q,
            scales,
            None if residual is None else summed,
            rows,
            eps,
            ADD=residual is not None,
            **tile,
            num_warps=norm_warps(size),
        )
    return q, scales, summed


@torch.library.custom_op("rayllm::rms_norm_int8", mutates_args=())
def rms_norm_int8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """For tensors that `supports` takes."""
    return _launch(x, None, weight, eps)[:2]


@rms_norm_int8.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("rayllm::add_rms_norm_int8", mutates_args=())
def add_rms_norm_int8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """For tensors that `supports_sum` takes."""
    return _launch(x, residual, weight, eps)


@add_rms_norm_int8.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    scales = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales, x.new_empty(x.shape)


def supports(x: Tensor, weight: Tensor) -> bool:
    return x.ndim == 2 and x.is_contiguous() and rms_norm.supports(x, weight)


def supports_sum(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    return x.ndim == 2 and rms_norm.supports_sum(x, residual, weight)


def _spec(size: int, *, dtype: str, add: bool) -> Spec:
    pointers = dict.fromkeys(("x", "weight", *(("residual", "summed") if add else ())), f"*{dtype}")
    pointers |= {"q": "*i8", "scales": "*fp32"}
    absent: dict[str, object] = {} if add else {"residual": None, "summed": None}
    constexprs = absent | norm_tile(size) | {"ADD": add}
    return Spec(
        name=f"{'add_' if add else ''}rms_norm_int8 D{size} {dtype}",
        kernel=rms_norm_int8_kernel,
        signature=pointers | {"rows": "i32", "eps": "fp32"} | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=tuple(pointers),
        num_warps=norm_warps(size),
        num_stages=3,
        expects=frozenset(),
    )


SPECS = [
    _spec(size, dtype=dtype, add=add)
    for size, dtype, add in product(rms_norm.SIZES, ("bf16", "fp16", "fp32"), (False, True))
]
