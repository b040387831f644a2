"""The compiled loops that make rows int8 on CPU, and find their bounds; `int8_linear` says what they compute."""

from typing import Any

import numpy as np

from rayllm_kernels.blocks import DOT_OFFSET
from rayllm_kernels.native import Kernel, integer, next_task
from rayllm_kernels.simd import (
    LANES,
    add,
    broadcast,
    inlined,
    load,
    load_bf16,
    load_f32,
    load_i32,
    max_abs,
    max_abs_lanes,
    mul,
    rint,
    store,
    store_f32,
    store_i8,
    store_i32,
    sum_lanes,
)


@inlined
def _widen_row(x: int, length: int, is_bf16: int, columns: int, num_columns: int, kept: int, wide: int) -> None:
    """Row x in float32; the columns (int32) that the product takes in 16 bits go to `kept` and count as zero."""
    for i in range(0, length, LANES):
        store(wide + 4 * i, load_bf16(x + 2 * i) if is_bf16 else load(x + 4 * i))
    for j in range(num_columns):
        place = wide + 4 * load_i32(columns + 4 * j)
        store_f32(kept + 4 * j, load_f32(place))
        store_f32(place, np.float32(0.0))


@inlined
def _bound_of_row(wide: int, length: int) -> float:
    largest = broadcast(np.float32(0.0))
    for i in range(0, length, LANES):
        largest = max_abs(largest, load(wide + 4 * i))
    return max_abs_lanes(largest)  # type: ignore[no-any-return]


@inlined
def quantize_row(
    x: int,
    length: int,
    is_bf16: int,
    columns: int,
    num_columns: int,
    kept: int,
    wide: int,
    q: int,
    start: int,
    given: int,
) -> float:
    """-> the scale of row x; int8 to `q`, the int32 its sums begin with to `start`. `given`: its bound, 0: found."""
    _widen_row(x, length, is_bf16, columns, num_columns, kept, wide)
    bound: Any = load_f32(given) if given != 0 else _bound_of_row(wide, length)
    factor = broadcast(np.float32(127.0) / bound if bound > np.float32(1e-30) else np.float32(0.0))
    total = broadcast(np.float32(0.0))  # of integers: exact
    for i in range(0, length, LANES):
        rounded = rint(mul(load(wide + 4 * i), factor))
        store_i8(q + i, rounded)
        total = add(total, rounded)
    store_i32(start, np.int32(-DOT_OFFSET * np.int64(sum_lanes(total))))
    return bound / np.float32(127.0)  # type: ignore[no-any-return]


def _quantize_rows(block: int) -> None:
    """Kernel: task = one row."""
    x, q, scale, kept, columns = (
        integer(block, 0),
        integer(block, 1),
        integer(block, 2),
        integer(block, 3),
        integer(block, 4),
    )
    length, is_bf16, num_columns, bounds = integer(block, 5), integer(block, 6), integer(block, 7), integer(block, 8)
    scratch = np.empty(length + LANES, np.float32)
    wide = scratch.ctypes.data
    item = 2 if is_bf16 else 4
    task = next_task(block)
    while task >= 0:
        row = x + task * length * item
        place = kept + 4 * task * num_columns
        value = quantize_row(
            row,
            length,
            is_bf16,
            columns,
            num_columns,
            place,
            wide,
            q + task * length,
            wide + 4 * length,
            bounds + 4 * task if bounds != 0 else 0,
        )
        store_f32(scale + 4 * task, value)
        task = next_task(block)
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


quantize_rows_kernel = Kernel(_quantize_rows, integers=9, parallel_from=8)


def _row_bounds(block: int) -> None:
    """Kernel: task = one row."""
    x, bound, columns = integer(block, 0), integer(block, 1), integer(block, 2)
    length, is_bf16, num_columns = integer(block, 3), integer(block, 4), integer(block, 5)
    scratch = np.empty(length + num_columns, np.float32)
    wide = scratch.ctypes.data
    task = next_task(block)
    while task >= 0:
        row = x + task * length * (2 if is_bf16 else 4)
        _widen_row(row, length, is_bf16, columns, num_columns, wide + 4 * length, wide)
        store_f32(bound + 4 * task, _bound_of_row(wide, length))
        task = next_task(block)
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


row_bounds_kernel = Kernel(_row_bounds, integers=6, parallel_from=8)
