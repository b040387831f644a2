"""The compiled loops behind `int8_linear` on CPU; what they compute is said there.

W8A8: integer sums of rows that `int8_rows` made, in vectors (VNNI where the processor has it) or AMX tiles, then one
epilogue for 16 outputs at a time that both share, so that a row of x gives bitwise the same by either. W8A16: weights
widened on their way, to float32 in vectors, to bfloat16 (which holds every int8) for the tiles. Letters as there.
"""

import numpy as np

from rayllm_kernels.amx import load_tile_config, release_tiles
from rayllm_kernels.blocks import (
    CACHE_LINE,
    STRIPE,
    TILE,
    dot_bytes,
    dot_floats,
    gather_stripe,
    pack,
    sum_stripe_bf16,
    sum_stripe_int8,
)
from rayllm_kernels.dispatch import int8_limits
from rayllm_kernels.int8_rows import quantize_row
from rayllm_kernels.native import Kernel, integer, next_task
from rayllm_kernels.simd import (
    LANES,
    F32x16,
    add,
    broadcast,
    fma,
    inlined,
    join_bf16,
    load,
    load_bf16,
    load_f32,
    load_f32_from_bf16,
    load_f32_from_i32,
    load_i8,
    mul,
    prefetch_to_write,
    store,
    store_bf16,
    store_bf16_exact,
    store_f32,
    transpose,
)

BLOCK = 4  # rows of x whose sums the vector products keep in registers
_LINE = 64  # bytes of the cache, and of the vectors that multiply integers
_GATHERED = 8  # tiles of x from which on it pays to gather 32 weight rows first
_DEPTH = 512  # bytes of 32 weight rows and of 32 rows of x that stay in the first-level cache together


# The first 8 integers of all products are the epilogue's: scale_N (float32), bias_N in the dtype of out (0: none), out,
# outputs, is_bf16, outlier weights [J, N] (bfloat16), J, unused. Each thread reads them once: the compiler cannot know
# that what it stores to `out` does not lie over them.


@inlined
def finish(
    sums: F32x16,
    x_scale: float,
    scale: F32x16,
    bias: int,
    out: int,
    outputs: int,
    is_bf16: int,
    kept: int,
    outlier_weight: int,
    num_columns: int,
    row: int,
    column: int,
) -> None:
    """out[row, column to column + 16] = sums * scales + the columns kept in 16 bits + bias."""
    value = mul(mul(sums, broadcast(x_scale)), scale)
    for j in range(num_columns):
        weight = load_bf16(outlier_weight + 2 * (j * outputs + column))
        value = fma(weight, broadcast(load_f32(kept + 4 * j)), value)
    target = out + (row * outputs + column) * (2 if is_bf16 else 4)
    if is_bf16:
        if bias != 0:
            value = add(value, load_bf16(bias + 2 * column))
        store_bf16(target, value)
    else:
        if bias != 0:
            value = add(value, load(bias + 4 * column))
        store(target, value)


_dot_bytes_1, _dot_bytes_4 = dot_bytes(BLOCK, 1), dot_bytes(BLOCK, BLOCK)


def _multiply_bytes(block: int) -> None:
    """Kernel: task = some weight rows, a multiple of 16. Every thread quantizes all rows of x for itself."""
    scale, bias, out, outputs = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    is_bf16, outlier_weight, num_columns = integer(block, 4), integer(block, 5), integer(block, 6)
    x, weight, columns, rows = integer(block, 8), integer(block, 9), integer(block, 10), integer(block, 11)
    length, outputs_per_task, x_is_bf16 = integer(block, 12), integer(block, 13), integer(block, 14)
    bounds = integer(block, 15)
    side = 1 if rows == 1 else BLOCK
    padded = (rows + side - 1) // side * side
    # float32 row, rows' scales, columns kept, 16 int32 starts a row, sums of a block; then bytes
    floats = length + padded + padded * num_columns + LANES * padded + LANES * BLOCK
    scratch = np.zeros(floats + padded * length // 4 + LANES, np.float32)
    wide = scratch.ctypes.data
    scales = wide + 4 * length
    kept = scales + 4 * padded
    starts = kept + 4 * padded * num_columns
    sums = starts + _LINE * padded
    q = (sums + _LINE * BLOCK + _LINE - 1) // _LINE * _LINE
    pitch = length * (2 if x_is_bf16 else 4)
    for m in range(rows):
        value = quantize_row(
            x + m * pitch,
            length,
            x_is_bf16,
            columns,
            num_columns,
            kept + 4 * m * num_columns,
            wide,
            q + m * length,
            starts + _LINE * m,
            bounds + 4 * m if bounds != 0 else 0,
        )
        store_f32(scales + 4 * m, value)
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for n in range(first, min(outputs, first + outputs_per_task), LANES):
            for m in range(0, rows, side):
                for part in range(0, LANES, BLOCK):
                    row = weight + (n + part) * length
                    if side == 1:
                        _dot_bytes_1(row, q, length, starts, sums + 4 * part)
                    else:
                        _dot_bytes_4(row, q + m * length, length, starts + _LINE * m, sums + 4 * part)
                for c in range(min(side, rows - m)):
                    value = load_f32(scales + 4 * (m + c))
                    ours = kept + 4 * (m + c) * num_columns
                    finish(
                        load_f32_from_i32(sums + _LINE * c),
                        value,
                        load(scale + 4 * n),
                        bias,
                        out,
                        outputs,
                        is_bf16,
                        ours,
                        outlier_weight,
                        num_columns,
                        m + c,
                        n,
                    )
        task = next_task(block)
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


multiply_bytes_kernel = Kernel(_multiply_bytes, integers=16)


@inlined
def _finish_pairs(
    sums: int, x_scales: int, scale: int, bias: int, out: int, outputs: int, row: int, rows: int, n: int, work: int
) -> None:
    """As `finish`, for bfloat16 without outlier columns: [32 outputs, 16 rows of x] sums to `rows` rows of out.

    Two outputs are joined to 32 bits before they are turned, so there is half as much to turn, and whole cache lines
    to write. `work`: 2 KB.
    """
    x_scale = load(x_scales)
    for pair in range(TILE):
        first = sums + 2 * _LINE * pair
        column = n + 2 * pair
        low = mul(mul(load_f32_from_i32(first), x_scale), broadcast(load_f32(scale + 4 * column)))
        high = mul(mul(load_f32_from_i32(first + _LINE), x_scale), broadcast(load_f32(scale + 4 * column + 4)))
        if bias != 0:
            low = add(low, broadcast(load_f32_from_bf16(bias + 2 * column)))
            high = add(high, broadcast(load_f32_from_bf16(bias + 2 * column + 2)))
        store(work + _LINE * pair, join_bf16(low, high))
    transpose(work, _LINE, TILE, work, work + 1024)
    for m in range(rows):
        store(out + 2 * ((row + m) * outputs + n), load(work + 1024 + _LINE * m))


@inlined
def _finish_tile(
    sums: int,
    x_scales: int,
    scale: int,
    bias: int,
    out: int,
    outputs: int,
    is_bf16: int,
    kept: int,
    outlier_weight: int,
    num_columns: int,
    row: int,
    rows: int,
    n: int,
    work: int,
) -> None:
    """[32 outputs, 16 rows of x] sums to `rows` rows of out, from `row` and output n on. `work`: 2 KB."""
    if is_bf16 and num_columns == 0:
        _finish_pairs(sums, x_scales, scale, bias, out, outputs, row, rows, n, work)
        return
    for column in range(n, n + STRIPE, TILE):
        transpose(sums + _LINE * (column - n), _LINE, TILE, work, work)
        for m in range(rows):
            finish(
                load_f32_from_i32(work + _LINE * m),
                load_f32(x_scales + 4 * m),
                load(scale + 4 * column),
                bias,
                out,
                outputs,
                is_bf16,
                kept + 4 * m * num_columns,
                outlier_weight,
                num_columns,
                row + m,
                column,
            )


def _multiply_byte_tiles(block: int) -> None:
    """Kernel: task = some weight rows, a multiple of 32. x is quantized."""
    scale, bias, out, outputs = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    is_bf16, outlier_weight, num_columns = integer(block, 4), integer(block, 5), integer(block, 6)
    q, weight, scales, kept = integer(block, 8), integer(block, 9), integer(block, 10), integer(block, 11)
    rows, length, outputs_per_task, config = (
        integer(block, 12),
        integer(block, 13),
        integer(block, 14),
        integer(block, 15),
    )
    tiles = (rows + TILE - 1) // TILE
    scratch = np.empty(tiles * (length // 4 * TILE + 512 + LANES) + 512 + STRIPE * _DEPTH // 4 + 1024, np.float32)
    packed = (scratch.ctypes.data + 63) // 64 * 64
    gathered = packed + 16 * tiles * length
    sums = gathered + STRIPE * _DEPTH
    work = sums + 2048 * (tiles + 1)
    x_scales = work + 2048
    zeros = x_scales + _LINE * tiles
    store(zeros, broadcast(np.float32(0.0)))
    for tile in range(tiles):
        pack(q + tile * TILE * length, rows - tile * TILE, length, zeros, packed + 16 * tile * length)
    for m in range(rows):
        store_f32(x_scales + 4 * m, load_f32(scales + 4 * m))
    load_tile_config(config)
    gathers = tiles >= _GATHERED
    depth = _DEPTH if gathers else length
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for n in range(first, min(outputs, first + outputs_per_task), STRIPE):
            stripe = weight + n * length
            for k in range(0, length, depth):
                many = min(depth, length - k)
                if gathers:
                    gather_stripe(stripe + k, length, many, gathered)
                for tile in range(0, tiles, 2):
                    left = packed + 16 * tile * length + 16 * k
                    right = left + 16 * length if tile + 1 < tiles else 0
                    place = sums + 2048 * tile
                    is_last = k + many == length
                    if is_last:
                        for m in range(tile * TILE, min(rows, (tile + 2) * TILE)):
                            prefetch_to_write(out + (m * outputs + n) * (2 if is_bf16 else 4))
                    if gathers:
                        sum_stripe_int8(gathered, _LINE, STRIPE * _LINE, left, right, many, place, k, 0)
                    else:
                        ahead = stripe + STRIPE * length if tile == 0 else 0
                        sum_stripe_int8(stripe, length, _LINE, left, right, many, place, 0, ahead)
                    for part in range(tile, min(tile + 2, tiles) if is_last else tile):
                        row = part * TILE
                        _finish_tile(
                            sums + 2048 * part,
                            x_scales + 4 * row,
                            scale,
                            bias,
                            out,
                            outputs,
                            is_bf16,
                            kept + 4 * row * num_columns,
                            outlier_weight,
                            num_columns,
                            row,
                            min(TILE, rows - row),
                            n,
                            work,
                        )
        task = next_task(block)
    release_tiles()
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


multiply_byte_tiles_kernel = Kernel(_multiply_byte_tiles, integers=16, runs_here=lambda: int8_limits().tiles)


def _finish_rows(block: int) -> None:
    """Kernel: task = one row of integer sums that torch has computed."""
    scale, bias, out, outputs = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    is_bf16, outlier_weight, num_columns = integer(block, 4), integer(block, 5), integer(block, 6)
    sums, scales, kept = integer(block, 8), integer(block, 9), integer(block, 10)
    task = next_task(block)
    while task >= 0:
        for n in range(0, outputs, LANES):
            found = load_f32_from_i32(sums + 4 * (task * outputs + n))
            finish(
                found,
                load_f32(scales + 4 * task),
                load(scale + 4 * n),
                bias,
                out,
                outputs,
                is_bf16,
                kept + 4 * task * num_columns,
                outlier_weight,
                num_columns,
                task,
                n,
            )
        task = next_task(block)


finish_rows_kernel = Kernel(_finish_rows, integers=11, parallel_from=8)

_dot_i8_1, _dot_i8_4 = dot_floats(1, 1, "int8"), dot_floats(BLOCK, BLOCK, "int8")


def _multiply_widened(block: int) -> None:
    """Kernel: task = some weight rows, a multiple of 16; x float32 or bfloat16, widened by every thread for itself."""
    scale, bias, out, outputs = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    is_bf16 = integer(block, 4)
    x, weight, rows, length = integer(block, 8), integer(block, 9), integer(block, 10), integer(block, 11)
    outputs_per_task = integer(block, 12)
    side = 1 if rows == 1 else BLOCK
    padded = (rows + side - 1) // side * side
    scratch = np.zeros(padded * length + BLOCK * BLOCK + LANES * BLOCK, np.float32)
    wide = scratch.ctypes.data
    sums = wide + 4 * padded * length
    turned = sums + 4 * BLOCK * BLOCK
    for i in range(0, rows * length, LANES):
        store(wide + 4 * i, load_bf16(x + 2 * i) if is_bf16 else load(x + 4 * i))
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for n in range(first, min(outputs, first + outputs_per_task), LANES):
            for m in range(0, rows, side):
                for part in range(0, LANES, side):
                    row = weight + (n + part) * length
                    if side == 1:
                        _dot_i8_1(row, wide, length, turned + 4 * part)
                    else:
                        _dot_i8_4(row, wide + 4 * m * length, length, sums)
                        for r in range(BLOCK):
                            for c in range(BLOCK):
                                store_f32(turned + _LINE * c + 4 * (part + r), load_f32(sums + 4 * (r * BLOCK + c)))
                for c in range(min(side, rows - m)):
                    finish(
                        load(turned + _LINE * c),
                        1.0,
                        load(scale + 4 * n),
                        bias,
                        out,
                        outputs,
                        is_bf16,
                        0,
                        0,
                        0,
                        m + c,
                        n,
                    )
        task = next_task(block)
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


multiply_widened_kernel = Kernel(_multiply_widened, integers=13)


def _multiply_widened_tiles(block: int) -> None:
    """Kernel: task = some weight rows, a multiple of 32, which become bfloat16 in the cache. x bfloat16."""
    scale, bias, out, outputs = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    is_bf16 = integer(block, 4)
    x, weight, rows, length = integer(block, 8), integer(block, 9), integer(block, 10), integer(block, 11)
    outputs_per_task, config = integer(block, 12), integer(block, 13)
    tiles = (rows + TILE - 1) // TILE
    scratch = np.empty((tiles * TILE + STRIPE) * length // 2 + 1024 + 256 + 2 * LANES, np.float32)
    packed = (scratch.ctypes.data + 63) // 64 * 64
    widened = packed + 32 * tiles * length
    sums = widened + 2 * STRIPE * length
    turned = sums + 4096
    zeros = turned + 1024
    store(zeros, broadcast(np.float32(0.0)))
    for tile in range(tiles):
        pack(x + 2 * tile * TILE * length, rows - tile * TILE, 2 * length, zeros, packed + 32 * tile * length)
    load_tile_config(config)
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for n in range(first, min(outputs, first + outputs_per_task), STRIPE):
            for i in range(0, STRIPE * length, LANES):
                store_bf16_exact(widened + 2 * i, load_i8(weight + n * length + i))
            for tile in range(0, tiles, 2):
                left = packed + 32 * tile * length
                right = left + 32 * length if tile + 1 < tiles else 0
                sum_stripe_bf16(widened, 2 * length, CACHE_LINE, left, right, 2 * length, sums, 0, 0)
                for part in range(4 if tile + 1 < tiles else 2):
                    transpose(sums + 1024 * part, 64, TILE, zeros, turned)
                    row, column = (tile + part // 2) * TILE, n + part % 2 * TILE
                    weight_scale = load(scale + 4 * column)
                    for m in range(row, min(row + TILE, rows)):
                        finish(
                            load(turned + 64 * (m - row)),
                            1.0,
                            weight_scale,
                            bias,
                            out,
                            outputs,
                            is_bf16,
                            0,
                            0,
                            0,
                            m,
                            column,
                        )
        task = next_task(block)
    release_tiles()
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


multiply_widened_tiles_kernel = Kernel(_multiply_widened_tiles, integers=14, runs_here=lambda: int8_limits().tiles)
