"""W8A8 on CPU with weights that were packed once, as the processor's dot product of bytes (VNNI) takes them.

Packed weights are uint8 [N / 32, K / 4, 32, 4]: the integers of `int8_linear` plus 128, the outputs of a panel side by
side in fours along K. A panel is read from one end to the other whatever the number of rows, a vector of sums holds
neighbouring outputs of one row of x, so nothing is turned or added up across lanes, and one loop serves every number of
rows. Rows of x are made int8 and packed in blocks of 12. The bits are those of the other loops.
"""

import numpy as np
import torch
from torch import Tensor

from rayllm_kernels.blocks import CACHE_LINE, DOT_OFFSET, PANEL, PANEL_ROWS, TILE, dot_panel, pack
from rayllm_kernels.dispatch import int8_limits
from rayllm_kernels.int8_products import finish
from rayllm_kernels.int8_rows import quantize_row
from rayllm_kernels.native import Kernel, integer, next_task
from rayllm_kernels.simd import (
    LANES,
    broadcast,
    inlined,
    load,
    load_f32,
    load_f32_from_i32,
    prefetch_to_write,
    store,
    store_f32,
)


def pack_weight(weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [N, K] -> uint8 [N / 32, K / 4, 32, 4], where `w8a8_linear` is faster with it; elsewhere the weight itself.

    A copy, to be held in the place of the weight. `dtype`: of the x that it will be multiplied with.
    """
    outputs, length = weight_NK.shape
    is_faster = int8_limits().packed and weight_NK.is_cpu and dtype in (torch.float32, torch.bfloat16)
    if not is_faster or outputs % PANEL != 0 or length % CACHE_LINE != 0:
        return weight_NK
    panels = weight_NK.view(outputs // PANEL, PANEL, length // 4, 4).transpose(1, 2).contiguous()
    return panels.view(torch.uint8).bitwise_xor_(DOT_OFFSET)


def unpack_weight(packed: Tensor) -> Tensor:
    """The int8 [N, K] that `pack_weight` was given."""
    panels, groups, _, _ = packed.shape
    return packed.bitwise_xor(DOT_OFFSET).view(torch.int8).transpose(1, 2).reshape(panels * PANEL, groups * 4)


@inlined
def _pack_rows(
    task: int,
    x: int,
    rows: int,
    length: int,
    is_bf16: int,
    columns: int,
    num_columns: int,
    bounds: int,
    packed: int,
    scales: int,
    starts: int,
    kept: int,
    work: int,
) -> None:
    """The task's 12 rows of x, int8 and packed [K / 4, 16, 4]; those past the end zero. `work`: `_work_bytes` of it."""
    first = task * PANEL_ROWS
    many = min(PANEL_ROWS, rows - first)
    zeros = work + 4 * length
    q = zeros + CACHE_LINE
    store(zeros, broadcast(np.float32(0.0)))
    for m in range(first, first + many):
        value = quantize_row(
            x + m * length * (2 if is_bf16 else 4),
            length,
            is_bf16,
            columns,
            num_columns,
            kept + 4 * m * num_columns,
            work,
            q + (m - first) * length,
            starts + 4 * m,
            bounds + 4 * m if bounds != 0 else 0,
        )
        store_f32(scales + 4 * m, value)
    pack(q, many, length, zeros, packed + task * TILE * length)


@inlined
def _work_bytes(length: int) -> int:
    return (4 + PANEL_ROWS) * length + CACHE_LINE


def _pack_all_rows(block: int) -> None:
    """Kernel: task = 12 rows of x."""
    x, packed, scales, starts = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    kept, columns, rows, length = integer(block, 4), integer(block, 5), integer(block, 6), integer(block, 7)
    is_bf16, num_columns, bounds = integer(block, 8), integer(block, 9), integer(block, 10)
    scratch = np.empty(_work_bytes(length) // 4, np.float32)
    work = scratch.ctypes.data
    task = next_task(block)
    while task >= 0:
        _pack_rows(task, x, rows, length, is_bf16, columns, num_columns, bounds, packed, scales, starts, kept, work)
        task = next_task(block)
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


pack_rows_kernel = Kernel(_pack_all_rows, integers=11)

_dot_1, _dot_2, _dot_4, _dot_8, _dot_12 = (dot_panel(rows) for rows in (1, 2, 4, 8, PANEL_ROWS))


@inlined
def _dot(weight: int, x: int, rows: int, length: int, starts: int, sums: int) -> None:
    """`dot_panel` for at least as many rows: those that are not there are zero."""
    if rows > 8:
        _dot_12(weight, x, length, starts, sums)
    elif rows > 4:
        _dot_8(weight, x, length, starts, sums)
    elif rows > 2:
        _dot_4(weight, x, length, starts, sums)
    elif rows > 1:
        _dot_2(weight, x, length, starts, sums)
    else:
        _dot_1(weight, x, length, starts, sums)


def _multiply_packed(block: int) -> None:
    """Kernel: task = some panels. `packed` 0: few rows, which every thread makes int8 for itself."""
    scale, bias, out, outputs = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    is_bf16, outlier_weight, num_columns = integer(block, 4), integer(block, 5), integer(block, 6)
    weight, packed, scales, starts = integer(block, 8), integer(block, 9), integer(block, 10), integer(block, 11)
    kept, rows, length, outputs_per_task = (
        integer(block, 12),
        integer(block, 13),
        integer(block, 14),
        integer(block, 15),
    )
    x, columns, bounds = integer(block, 16), integer(block, 17), integer(block, 18)
    blocks = (rows + PANEL_ROWS - 1) // PANEL_ROWS
    mine = blocks if packed == 0 else 0
    size = 4 * PANEL * PANEL_ROWS + 2 * CACHE_LINE  # sums
    size += mine * (TILE * length + 4 * PANEL_ROWS * (num_columns + 2)) + _work_bytes(length)
    scratch = np.empty(size // 4, np.float32)
    sums = (scratch.ctypes.data + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
    if packed == 0:
        packed = sums + 4 * PANEL * PANEL_ROWS
        scales = packed + blocks * TILE * length
        starts = scales + 4 * blocks * PANEL_ROWS
        kept = starts + 4 * blocks * PANEL_ROWS
        work = kept + 4 * blocks * PANEL_ROWS * num_columns
        for i in range(blocks):
            _pack_rows(i, x, rows, length, is_bf16, columns, num_columns, bounds, packed, scales, starts, kept, work)
    item = 2 if is_bf16 else 4
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for n in range(first, min(outputs, first + outputs_per_task), PANEL):
            for m in range(0, rows, PANEL_ROWS):
                many = min(PANEL_ROWS, rows - m)
                for r in range(many):
                    prefetch_to_write(out + ((m + r) * outputs + n) * item)
                _dot(weight + n * length, packed + m // PANEL_ROWS * TILE * length, many, length, starts + 4 * m, sums)
                for r in range(many):
                    for part in range(0, PANEL, LANES):
                        finish(
                            load_f32_from_i32(sums + 4 * (PANEL * r + part)),
                            load_f32(scales + 4 * (m + r)),
                            load(scale + 4 * (n + part)),
                            bias,
                            out,
                            outputs,
                            is_bf16,
                            kept + 4 * (m + r) * num_columns,
                            outlier_weight,
                            num_columns,
                            m + r,
                            n + part,
                        )
        task = next_task(block)
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


multiply_packed_kernel = Kernel(_multiply_packed, integers=19, runs_here=lambda: int8_limits().packed)
