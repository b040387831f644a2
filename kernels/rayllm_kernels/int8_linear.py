"""x @ weight.T + bias with int8 weights: W8A8 (x int8 too, row by row) and W8A16 (x as it is).

Every output has a scale of its own, every row of x gets one (symmetric, the largest value becomes 127), so that both
come out of the sum and are multiplied in once, at the end:

    out[t, n] = x_scale[t] * weight_scale[n] * sum over k of x_q[t, k] * weight[n, k]   + bias[n]

Mixed outlier columns as in LLM.int8() (Dettmers et al. 2022): the columns J of x are left out of its scale and its
integers (they count as zero there, so what the int8 weight holds in them does not matter), and their products with
weights of 16 bits are added in float32 before the bias. A row of x with NaN or an infinity gives no finite output.

A row's scale is its bound, the largest magnitude without the outlier columns, / 127. Whoever holds a part of each row
only can have its bounds from `row_bounds`, and give those of the whole rows: the integers are then those of the whole.
`w8a8_epilogue` makes of the sums of all parts what one product would: all that is not exact is in it.

On a CPU with VNNI and without AMX tiles the W8A8 product is fastest with a weight that was packed once (`pack_weight`),
which takes the place of the plain one.

Letters: T rows of x, K its length, N outputs, J outlier columns. No gradients. Whoever holds the model decides which
columns; nothing here knows of checkpoints.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels.amx import TILE_CONFIG
from rayllm_kernels.blocks import PANEL, PANEL_ROWS, TILE
from rayllm_kernels.dispatch import int8_limits, loops_without_gradient_may_run, on_triton
from rayllm_kernels.int8_packed import multiply_packed_kernel, pack_rows_kernel, unpack_weight
from rayllm_kernels.int8_products import (
    finish_rows_kernel,
    multiply_byte_tiles_kernel,
    multiply_bytes_kernel,
    multiply_widened_kernel,
    multiply_widened_tiles_kernel,
)
from rayllm_kernels.int8_rows import quantize_rows_kernel, row_bounds_kernel
from rayllm_kernels.native import empty

MAX_LENGTH = 2**31 // (127 * 255)  # of a row: longer sums may not fit 32 bits
_ROWS = 512  # of x at a time, so that what each thread packs of it stays in its cache
_FEW_ROWS = 16  # of x, which every thread makes int8 for itself rather than wait for another kernel
_TINY = 1e-30  # a row whose largest value is less is zero
_INT8, _INT32, _FLOAT32 = torch.empty(0, dtype=torch.int8), torch.empty(0).int(), torch.empty(0)  # for `empty`
_BYTES_PER_TASK = 1 << 17  # of weights, about: 10 microseconds of reading


def row_bounds_reference(x: Tensor, outlier_columns_J: Tensor | None = None) -> Tensor:
    """The contract of `row_bounds` in plain torch, on any device."""
    x_TK = x.reshape(-1, x.shape[-1])
    if outlier_columns_J is not None:
        x_TK = x_TK.index_fill(1, outlier_columns_J.long(), 0)
    return x_TK.abs().amax(dim=-1, keepdim=True).float()


def quantize_rows_reference(x_TK: Tensor, row_bound_T1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The contract of `quantize_rows` in plain torch, on any device. `row_bound_T1`: as in `w8a8_linear`."""
    wide = x_TK.float()
    bound_T1 = row_bounds_reference(x_TK) if row_bound_T1 is None else row_bound_T1
    factor_T1 = torch.where(bound_T1 > _TINY, torch.full_like(bound_T1, 127.0) / bound_T1, 0.0)
    return (wide * factor_T1).round().nan_to_num().to(torch.int8), bound_T1 / 127.0


def w8a8_linear_reference(
    x: Tensor,
    weight_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None = None,
    *,
    outlier_columns_J: Tensor | None = None,
    outlier_weight_NJ: Tensor | None = None,
    row_bound_T1: Tensor | None = None,
) -> Tensor:
    """The contract of `w8a8_linear` in plain torch, on any device and for any shape."""
    x_TK = x.reshape(-1, x.shape[-1])
    kept_TJ = None
    if outlier_columns_J is not None:
        kept_TJ = x_TK[:, outlier_columns_J]
        x_TK = x_TK.index_fill(1, outlier_columns_J.long(), 0)
    bound_T1 = row_bounds_reference(x_TK) if row_bound_T1 is None else row_bound_T1
    q_TK, _ = quantize_rows_reference(x_TK, bound_T1)
    out_TN = w8a8_epilogue_reference(
        _integer_product(q_TK, weight_NK),
        bound_T1,
        scale_N1,
        bias_N,
        kept_TJ=kept_TJ,
        outlier_weight_NJ=outlier_weight_NJ,
        dtype=x.dtype,
    )
    return out_TN.view(*x.shape[:-1], weight_NK.shape[0])


def w8a8_epilogue_reference(
    sums_TN: Tensor,
    row_bound_T1: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None = None,
    *,
    kept_TJ: Tensor | None = None,
    outlier_weight_NJ: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The contract of `w8a8_epilogue` in plain torch, on any device and for any shape."""
    out_TN = sums_TN.float() * (row_bound_T1 / 127.0) * scale_N1.float().T
    if kept_TJ is not None and outlier_weight_NJ is not None:
        out_TN += kept_TJ.float() @ outlier_weight_NJ.float().T
    if bias_N is not None:
        out_TN += bias_N.float()
    return out_TN.to(dtype)


def w8a16_linear_reference(x: Tensor, weight_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The contract of `w8a16_linear` in plain torch, on any device and for any shape."""
    out = F.linear(x.float(), weight_NK.float()) * scale_N1.float().T
    return (out if bias_N is None else out + bias_N.float()).to(x.dtype)


def _integer_product(q_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Exact: int32, or float64 where torch has no product of int8."""
    if q_TK.is_cpu and q_TK.numel() > 0:
        return torch._int_mm(q_TK, weight_NK.t())
    return q_TK.double() @ weight_NK.double().T


def quantize_rows(
    x_TK: Tensor, row_bound_T1: Tensor | None = None, *, outlier_columns_J: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> int8 [T, K] and float32 scales [T, 1], so that q * scale is x to half a scale; outlier columns are zero.

    `row_bound_T1`: as in `w8a8_linear`.
    """
    columns = _none_if_empty(outlier_columns_J)
    if _on_triton("quantize_rows", x_TK):
        from rayllm_kernels.gpu import int8_linear as gpu

        q_TK, scale_T1, _ = gpu.quantize_rows(x_TK.contiguous(), columns, row_bound_T1)
        return q_TK, scale_T1
    if not _compiled(x_TK):
        if columns is not None:
            x_TK = x_TK.index_fill(1, columns.long(), 0)
        return quantize_rows_reference(x_TK, row_bound_T1)
    q_TK, scale_T1, _ = _quantize(x_TK, columns, row_bound_T1)
    return q_TK, scale_T1


def row_bounds(x: Tensor, outlier_columns_J: Tensor | None = None) -> Tensor:
    """x [..., K] float -> the largest magnitude of each row [T, 1] float32, NaN where the row has one.

    `outlier_columns_J` int32 do not count.
    """
    length = x.shape[-1]
    rows = x.numel() // length
    columns = _none_if_empty(outlier_columns_J)
    if _on_triton("row_bounds", x):
        from rayllm_kernels.gpu import int8_linear as gpu

        bound: Tensor = gpu.row_bounds(x.reshape(rows, length).contiguous(), columns)
        return bound
    if not _compiled(x):
        return row_bounds_reference(x, columns)
    bound_T1 = empty((rows, 1), _FLOAT32)
    row_bounds_kernel(
        rows,
        x.data_ptr(),
        bound_T1.data_ptr(),
        0 if columns is None else columns.data_ptr(),
        length,
        x.dtype == torch.bfloat16,
        0 if columns is None else len(columns),
    )
    return bound_T1


def w8a8_linear(
    x: Tensor,
    weight: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None = None,
    *,
    outlier_columns_J: Tensor | None = None,
    outlier_weight_NJ: Tensor | None = None,
    row_bound_T1: Tensor | None = None,
) -> Tensor:
    """x [..., K] float -> [..., N] in its dtype, x made int8 on the way. `weight`: int8 [N, K], or that packed.

    `outlier_columns_J` int32, each at most once; `outlier_weight_NJ` bfloat16, quickest as the transpose of a
    contiguous [J, N]. `row_bound_T1`, contiguous float32: not less than `row_bounds` of x, which None stands for.
    """
    outputs, length = scale_N1.shape[0], x.shape[-1]
    assert length <= MAX_LENGTH, f"{length} products may not fit 32 bits"
    rows = x.numel() // length
    columns = _none_if_empty(outlier_columns_J)
    weight_JN = None if columns is None or outlier_weight_NJ is None else outlier_weight_NJ.t().contiguous()
    if weight.dim() == 4 and _compiled(x, None, scale_N1, bias_N):
        out = empty((*x.shape[:-1], outputs), x)
        x_parts, out_parts = x.view(rows, length), out.view(rows, outputs)
        for first in range(0, rows, _ROWS):
            part = slice(first, first + _ROWS)
            finish = _epilogue(out_parts[part], scale_N1, bias_N, weight_JN)
            _multiply_packed(
                x_parts[part], weight, finish, columns, None if row_bound_T1 is None else row_bound_T1[part]
            )
        return out
    weight_NK = unpack_weight(weight) if weight.dim() == 4 else weight
    if _on_triton("w8a8_linear", x):
        from rayllm_kernels.gpu import int8_linear as gpu

        q_TK, scale_T1, kept_TJ = gpu.quantize_rows(x.reshape(rows, length).contiguous(), columns, row_bound_T1)
        product: Tensor = gpu.w8a8_product(q_TK, scale_T1, weight_NK, scale_N1, bias_N, kept_TJ, weight_JN)
        return product.view(*x.shape[:-1], outputs)
    if not _compiled(x, weight_NK, scale_N1, bias_N):
        return w8a8_linear_reference(
            x,
            weight_NK,
            scale_N1,
            bias_N,
            outlier_columns_J=columns,
            outlier_weight_NJ=outlier_weight_NJ,
            row_bound_T1=row_bound_T1,
        )
    out = empty((*x.shape[:-1], outputs), x)
    limits = int8_limits()
    if rows <= limits.vector_w8a8:
        tasks, per_task = _split(outputs, length, 16)
        multiply_bytes_kernel(
            tasks,
            *_epilogue(out, scale_N1, bias_N, weight_JN),
            x.data_ptr(),
            weight_NK.data_ptr(),
            0 if columns is None else columns.data_ptr(),
            rows,
            length,
            per_task,
            x.dtype == torch.bfloat16,
            0 if row_bound_T1 is None else row_bound_T1.data_ptr(),
        )
        return out
    x_parts, out_parts = x.view(rows, length), out.view(rows, outputs)
    for first in range(0, rows, _ROWS):
        part = slice(first, first + _ROWS)
        q_TK, scale_T1, kept_TJ = _quantize(
            x_parts[part], columns, None if row_bound_T1 is None else row_bound_T1[part]
        )
        kept = 0 if kept_TJ is None else kept_TJ.data_ptr()
        finish = _epilogue(out_parts[part], scale_N1, bias_N, weight_JN)
        if limits.tiles and outputs % 32 == 0:
            tasks, per_task = _split(outputs, length, 32)
            multiply_byte_tiles_kernel(
                tasks,
                *finish,
                q_TK.data_ptr(),
                weight_NK.data_ptr(),
                scale_T1.data_ptr(),
                kept,
                len(q_TK),
                length,
                per_task,
                TILE_CONFIG,
            )
        else:
            sums_TN = torch._int_mm(q_TK, weight_NK.t())
            finish_rows_kernel(len(q_TK), *finish, sums_TN.data_ptr(), scale_T1.data_ptr(), kept)
    return out


def w8a8_epilogue(
    sums_TN: Tensor,
    row_bound_T1: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None = None,
    *,
    kept_TJ: Tensor | None = None,
    outlier_weight_NJ: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The sums of whole rows, int32 and exact, with the rows' bounds -> [T, N] in `dtype`, that of x.

    `kept_TJ`: x in the outlier columns, float32, in the order of `outlier_weight_NJ`. On CPU the bits are those of
    `w8a8_linear` over the whole of x, for a length that its compiled loops take.
    """
    rows, outputs = sums_TN.shape
    kept_TJ = _none_if_empty(kept_TJ)
    weight_JN = None if kept_TJ is None or outlier_weight_NJ is None else outlier_weight_NJ.t().contiguous()
    if not (
        loops_without_gradient_may_run(sums_TN)
        and sums_TN.numel() > 0
        and outputs % 16 == 0
        and (dtype == torch.bfloat16 or dtype == torch.float32)
        and scale_N1.dtype == torch.float32
        and scale_N1.is_contiguous()
        and (bias_N is None or (bias_N.dtype == dtype and bias_N.is_contiguous()))
    ):
        return w8a8_epilogue_reference(
            sums_TN,
            row_bound_T1,
            scale_N1,
            bias_N,
            kept_TJ=kept_TJ,
            outlier_weight_NJ=outlier_weight_NJ,
            dtype=dtype,
        )
    out_TN = torch.empty((rows, outputs), dtype=dtype)
    sums_TN, scale_T1 = sums_TN.contiguous(), (row_bound_T1 / 127.0).contiguous()
    kept_TJ = None if kept_TJ is None else kept_TJ.contiguous()
    finish_rows_kernel(
        rows,
        *_epilogue(out_TN, scale_N1, bias_N, weight_JN),
        sums_TN.data_ptr(),
        scale_T1.data_ptr(),
        0 if kept_TJ is None else kept_TJ.data_ptr(),
    )
    return out_TN


def w8a16_linear(x: Tensor, weight_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x [..., K] float -> [..., N] in its dtype; sums in float32."""
    outputs, length = weight_NK.shape
    rows = x.numel() // length
    if _on_triton("w8a16_linear", x):
        from rayllm_kernels.gpu import int8_linear as gpu

        out: Tensor = gpu.w8a16_product(x.reshape(rows, length).contiguous(), weight_NK, scale_N1, bias_N)
        return out.view(*x.shape[:-1], outputs)
    if not _compiled(x, weight_NK, scale_N1, bias_N):
        return w8a16_linear_reference(x, weight_NK, scale_N1, bias_N)
    limits, is_bf16 = int8_limits(), x.dtype == torch.bfloat16
    out = empty((*x.shape[:-1], outputs), x)
    if rows <= (limits.vector_bfloat16 if is_bf16 else limits.vector_float32):
        tasks, per_task = _split(outputs, length, 16)
        multiply_widened_kernel(
            tasks,
            *_epilogue(out, scale_N1, bias_N, None),
            x.data_ptr(),
            weight_NK.data_ptr(),
            rows,
            length,
            per_task,
        )
        return out
    if is_bf16 and limits.tiles and outputs % 32 == 0:
        tasks, per_task = _split(outputs, length, 32)
        x_parts, out_parts = x.view(rows, length), out.view(rows, outputs)
        for first in range(0, rows, _ROWS):
            part = x_parts[first : first + _ROWS]
            multiply_widened_tiles_kernel(
                tasks,
                *_epilogue(out_parts[first : first + _ROWS], scale_N1, bias_N, None),
                part.data_ptr(),
                weight_NK.data_ptr(),
                len(part),
                length,
                per_task,
                TILE_CONFIG,
            )
        return out
    # Only the product pays on this machine; the weight in the dtype of x lives as long as the call.
    product = F.linear(x, weight_NK.to(x.dtype)).float() * scale_N1.T
    return (product if bias_N is None else product + bias_N.float()).to(x.dtype)


def _on_triton(op: str, x: Tensor) -> bool:
    """Rows that begin where 16 elements can be read at once; of others Triton would make further, slow binaries."""
    return x.numel() > 0 and x.shape[-1] % 16 == 0 and on_triton(op, x)


def _compiled(
    x: Tensor, weight_NK: Tensor | None = None, scale_N1: Tensor | None = None, bias: Tensor | None = None
) -> bool:
    """Whether the compiled products take these tensors."""
    return (
        loops_without_gradient_may_run(x)
        and x.numel() > 0
        and (x.dtype == torch.bfloat16 or x.dtype == torch.float32)
        and x.is_contiguous()
        and x.shape[-1] % 64 == 0
        and (weight_NK is None or (weight_NK.is_contiguous() and weight_NK.shape[0] % 16 == 0))
        and (scale_N1 is None or (scale_N1.dtype == torch.float32 and scale_N1.is_contiguous()))
        and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))
    )


def _none_if_empty(columns_J: Tensor | None) -> Tensor | None:
    return columns_J if columns_J is not None and columns_J.numel() > 0 else None


def _quantize(x_TK: Tensor, columns_J: Tensor | None, bound_T1: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> int8 [T, K], scales [T, 1], the columns that it left out [T, J] float32."""
    rows, length = x_TK.shape
    q_TK = empty((rows, length), _INT8)
    scale_T1 = empty((rows, 1), _FLOAT32)
    kept_TJ = None if columns_J is None else empty((rows, len(columns_J)), _FLOAT32)
    quantize_rows_kernel(
        rows,
        x_TK.data_ptr(),
        q_TK.data_ptr(),
        scale_T1.data_ptr(),
        0 if kept_TJ is None else kept_TJ.data_ptr(),
        0 if columns_J is None else columns_J.data_ptr(),
        length,
        x_TK.dtype == torch.bfloat16,
        0 if columns_J is None else len(columns_J),
        0 if bound_T1 is None else bound_T1.data_ptr(),
    )
    return q_TK, scale_T1, kept_TJ


def _multiply_packed(
    x_TK: Tensor, weight: Tensor, epilogue: tuple[int, ...], columns_J: Tensor | None, bound_T1: Tensor | None
) -> None:
    (rows, length), (panels, _, _, _) = x_TK.shape, weight.shape
    tasks, per_task = _split(panels * PANEL, length, PANEL)
    num_columns, columns = (0, 0) if columns_J is None else (len(columns_J), columns_J.data_ptr())
    given, is_bf16 = 0 if bound_T1 is None else bound_T1.data_ptr(), x_TK.dtype == torch.bfloat16
    packed: tuple[int, ...] = (0, 0, 0, 0)
    if rows > _FEW_ROWS:
        blocks = -(-rows // PANEL_ROWS)
        tensors = (
            empty((blocks, length * TILE), _INT8),
            empty((blocks * PANEL_ROWS,), _FLOAT32),
            empty((blocks * PANEL_ROWS,), _INT32),
            empty((rows, num_columns), _FLOAT32),
        )
        packed = tuple(tensor.data_ptr() for tensor in tensors)
        pack_rows_kernel(blocks, x_TK.data_ptr(), *packed, columns, rows, length, is_bf16, num_columns, given)
    multiply_packed_kernel(
        tasks,
        *epilogue,
        weight.data_ptr(),
        *packed,
        rows,
        length,
        per_task,
        x_TK.data_ptr(),
        columns,
        given,
    )


def _epilogue(out: Tensor, scale_N1: Tensor, bias_N: Tensor | None, weight_JN: Tensor | None) -> tuple[int, ...]:
    """The arguments that all products begin with."""
    return (
        scale_N1.data_ptr(),
        0 if bias_N is None else bias_N.data_ptr(),
        out.data_ptr(),
        out.shape[-1],
        out.dtype == torch.bfloat16,
        0 if weight_JN is None else weight_JN.data_ptr(),
        0 if weight_JN is None else len(weight_JN),
        0,
    )


def _split(outputs: int, length: int, step: int) -> tuple[int, int]:
    """-> tasks, and the outputs of each, a multiple of `step`: each thread gets the same, unless cores are uneven."""
    threads = torch.get_num_threads()
    tasks = -(-outputs * length // (_BYTES_PER_TASK * threads)) * threads
    per_task = -(-outputs // (tasks * step)) * step
    return -(-outputs // per_task), per_task
