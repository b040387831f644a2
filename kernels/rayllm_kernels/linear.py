"""x @ weight.T + bias for few rows of x, at the speed of reading the weight once.

A decode step is little else than such products, and torch's reach half of the memory bandwidth or less on the small
matrices of a small model. Two compiled products: vectors, which widen a block of weight rows to float32 and keep
its sums with up to four rows of x in registers; and AMX tiles, which multiply 16 weight rows with 16 rows of x at a
time. Both read the weight where it lies, in its checkpoint layout, and accumulate in float32. In either, what a row
of x gives does not depend on how many other rows there are. `dispatch` says which serves when.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels.amx import (
    TILE_CONFIG,
    load_tile_config,
    release_tiles,
    tile_dot_bf16,
    tile_load,
    tile_store,
    tile_zero,
)
from rayllm_kernels.dispatch import linear_limits
from rayllm_kernels.native import Kernel, empty, integer, next_task
from rayllm_kernels.simd import (
    FLOATS,
    LANES,
    add,
    broadcast,
    emit_fma,
    emit_load,
    emit_load_bf16,
    emit_prefetch,
    emit_sum_lanes,
    inlined,
    load,
    load_bf16,
    load_f32,
    load_f32_from_bf16,
    operation,
    pointer,
    splat,
    store,
    store_bf16,
    store_bf16_scalar,
    store_f32,
    transpose,
)

_BLOCK = 4  # weight rows, and rows of x, whose sums the vector product keeps in registers
_CACHE_LINE = 64
_AHEAD = 8192  # bytes
_BYTES_PER_TASK = 1 << 18  # of weights, about: 10 microseconds of reading


def linear_reference(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The contract of `linear`: torch's own, on any device and under autograd."""
    return F.linear(x, weight_NK, bias_N)


def _dot_block(rows: int, columns: int, *, bf16: bool) -> Any:
    """Intrinsic: `rows` weight rows times `columns` float32 rows of x -> float32 [rows, columns] at `out`.

    Arguments: weight, x, length of a row (whole cache lines of weights), out. Every sum adds up in the same order,
    whatever the block's shape. Fetches weights into the second-level cache ahead of their use: left to itself the
    hardware starts anew at each page and reaches two thirds of the bandwidth.
    """
    item, emit_weight = (2, emit_load_bf16) if bf16 else (4, emit_load)
    per_line = _CACHE_LINE // item

    @operation(types.void, types.int64, types.int64, types.int64, types.int64)
    def emit(builder: Any, weight: Any, x: Any, length: Any, out: Any) -> Any:
        int64 = ir.IntType(64)
        pitch = builder.mul(length, int64(item))
        starts = [builder.add(weight, builder.mul(pitch, int64(r))) for r in range(rows)]
        vectors = [builder.add(x, builder.mul(length, int64(4 * c))) for c in range(columns)]
        ahead = int64(_AHEAD) if rows == 1 else builder.mul(pitch, int64(rows))
        sums = [[cgutils.alloca_once_value(builder, splat(0.0, FLOATS)) for _ in vectors] for _ in starts]
        with cgutils.for_range(builder, builder.udiv(length, int64(per_line))) as loop:
            line = builder.mul(loop.index, int64(_CACHE_LINE))
            for start in starts:
                emit_prefetch(builder, builder.add(builder.add(start, line), ahead))
            for part in range(0, per_line, LANES):
                step = builder.add(line, int64(part * item))
                x_step = builder.add(builder.mul(loop.index, int64(per_line * 4)), int64(part * 4))
                values = [emit_load(builder, builder.add(vector, x_step)) for vector in vectors]
                for start, totals in zip(starts, sums, strict=True):
                    wide = emit_weight(builder, builder.add(start, step))
                    for value, total in zip(values, totals, strict=True):
                        builder.store(emit_fma(builder, wide, value, builder.load(total)), total)
        for i, total in enumerate(total for totals in sums for total in totals):
            target = pointer(builder, builder.add(out, int64(4 * i)), ir.FloatType())
            builder.store(emit_sum_lanes(builder, builder.load(total)), target)

    return emit


_dot_bf16_1, _dot_bf16_4 = _dot_block(1, 1, bf16=True), _dot_block(_BLOCK, _BLOCK, bf16=True)
_dot_f32_1, _dot_f32_4 = _dot_block(1, 1, bf16=False), _dot_block(_BLOCK, _BLOCK, bf16=False)


@inlined
def _dot(weight: int, x: int, length: int, out: int, columns: int, is_bf16: int) -> None:
    if is_bf16:
        if columns == 1:
            _dot_bf16_1(weight, x, length, out)
        else:
            _dot_bf16_4(weight, x, length, out)
    elif columns == 1:
        _dot_f32_1(weight, x, length, out)
    else:
        _dot_f32_4(weight, x, length, out)


def _multiply_vectors(block: int) -> None:
    """Kernel: task = some weight rows. `bias` 0: none."""
    x, weight, bias, out = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    rows, outputs, length = integer(block, 4), integer(block, 5), integer(block, 6)
    outputs_per_task, is_bf16 = integer(block, 7), integer(block, 8)
    item = 2 if is_bf16 else 4
    side = 1 if rows == 1 else _BLOCK
    padded = (rows + side - 1) // side * side
    scratch = np.zeros(padded * length + side * side, np.float32)
    wide = scratch.ctypes.data
    sums = wide + 4 * padded * length
    for i in range(0, rows * length, LANES):
        store(wide + 4 * i, load_bf16(x + 2 * i) if is_bf16 else load(x + 4 * i))
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for start in range(first, min(outputs, first + outputs_per_task), side):
            n = min(start, outputs - side)  # the last block overlaps the one before where the side does not divide
            for m in range(0, rows, side):
                _dot(weight + n * length * item, wide + 4 * m * length, length, sums, side, is_bf16)
                for r in range(side):
                    for c in range(min(side, rows - m)):
                        value = load_f32(sums + 4 * (r * side + c))
                        target = out + ((m + c) * outputs + n + r) * item
                        if is_bf16:
                            if bias != 0:
                                value += load_f32_from_bf16(bias + 2 * (n + r))
                            store_bf16_scalar(target, value)
                        else:
                            if bias != 0:
                                value += load_f32(bias + 4 * (n + r))
                            store_f32(target, value)
        task = next_task(block)
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


_multiply_vectors_kernel = Kernel(_multiply_vectors, integers=9)

_TILE = 16  # weight rows, rows of x, and pairs of bfloat16 along the length, of one tile
_STRIPE = 32  # weight rows multiplied at a time: with one tile, each product would wait for the one before
_zero_0, _zero_1, _zero_2, _zero_3 = (tile_zero(i) for i in range(4))
_store_0, _store_1, _store_2, _store_3 = (tile_store(i) for i in range(4))
_load_upper, _load_lower, _load_left, _load_right = (tile_load(i) for i in range(4, 8))
_dot_upper_left, _dot_lower_left = tile_dot_bf16(0, 4, 6), tile_dot_bf16(1, 5, 6)
_dot_upper_right, _dot_lower_right = tile_dot_bf16(2, 4, 7), tile_dot_bf16(3, 5, 7)


@inlined
def _pack(x: int, rows: int, length: int, zeros: int, packed: int) -> None:
    """x [rows <= 16, length] of bfloat16 -> pairs along the length by row [length / 2, 16], rows past the end zero."""
    for pair in range(0, length // 2, _TILE):
        transpose(x + 4 * pair, 2 * length, rows, zeros, packed + 64 * pair)


@inlined
def _sum_stripe(weight: int, left: int, right: int, length: int, sums: int) -> None:
    """32 weight rows times 16 packed rows of x, or twice 16 -> float32 [left and right, 32 weight rows, 16] at sums.

    `right` 0: none.
    """
    _zero_0()
    _zero_1()
    _zero_2()
    _zero_3()
    for k in range(0, length, 2 * _TILE):
        _load_left(left + 32 * k, 64)
        _load_upper(weight + 2 * k, 2 * length)
        _dot_upper_left()
        _load_lower(weight + 2 * (_TILE * length + k), 2 * length)
        _dot_lower_left()
        if right != 0:
            _load_right(right + 32 * k, 64)
            _dot_upper_right()
            _dot_lower_right()
    _store_0(sums, 64)
    _store_1(sums + 1024, 64)
    if right != 0:
        _store_2(sums + 2048, 64)
        _store_3(sums + 3072, 64)


def _multiply_tiles(block: int) -> None:
    """Kernel: task = some weight rows, a multiple of 32. All bfloat16. `bias` 0: none."""
    x, weight, bias, out = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    rows, outputs, length = integer(block, 4), integer(block, 5), integer(block, 6)
    outputs_per_task, tile_config = integer(block, 7), integer(block, 8)
    tiles = (rows + _TILE - 1) // _TILE
    scratch = np.empty(tiles * length // 2 * _TILE + 1024 + 256 + 2 * LANES, np.float32)
    packed = (scratch.ctypes.data + 63) // 64 * 64
    sums = packed + 32 * tiles * length
    turned = sums + 4096
    zeros = turned + 1024
    store(zeros, broadcast(np.float32(0.0)))
    for tile in range(tiles):
        _pack(x + 2 * tile * _TILE * length, rows - tile * _TILE, length, zeros, packed + 32 * tile * length)
    load_tile_config(tile_config)
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for n in range(first, min(outputs, first + outputs_per_task), _STRIPE):
            for tile in range(0, tiles, 2):
                left = packed + 32 * tile * length
                _sum_stripe(weight + 2 * n * length, left, left + 32 * length if tile + 1 < tiles else 0, length, sums)
                for part in range(4 if tile + 1 < tiles else 2):
                    transpose(sums + 1024 * part, 64, _TILE, zeros, turned)
                    row, column = (tile + part // 2) * _TILE, n + part % 2 * _TILE
                    offset = load_bf16(bias + 2 * column) if bias != 0 else broadcast(np.float32(0.0))
                    for m in range(min(_TILE, rows - row)):
                        store_bf16(out + 2 * ((row + m) * outputs + column), add(load(turned + 64 * m), offset))
        task = next_task(block)
    release_tiles()
    scratch[0] = 0  # numba frees an array after its last use, and addresses are no use


_multiply_tiles_kernel = Kernel(_multiply_tiles, integers=9, runs_here=lambda: linear_limits().tile_bfloat16 > 0)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x [..., K] -> [..., N], in the dtype of all three."""
    outputs, length = weight_NK.shape
    rows = x.numel() // length
    if (
        rows == 0
        or torch.is_grad_enabled()
        or not x.is_cpu
        or x.dtype != weight_NK.dtype
        or not (x.is_contiguous() and weight_NK.is_contiguous())
        or not (bias_N is None or (bias_N.is_contiguous() and bias_N.dtype == x.dtype))
    ):
        return linear_reference(x, weight_NK, bias_N)
    limits, bf16 = linear_limits(), x.dtype == torch.bfloat16
    if bf16 and limits.vector_bfloat16 < rows <= limits.tile_bfloat16 and outputs % _STRIPE == length % 32 == 0:
        kernel, last = _multiply_tiles_kernel, TILE_CONFIG
    elif (
        rows <= (limits.vector_bfloat16 if bf16 else limits.vector_float32 if x.dtype == torch.float32 else 0)
        and outputs >= _BLOCK
        and length % (32 if bf16 else 16) == 0
    ):
        kernel, last = _multiply_vectors_kernel, int(bf16)
    else:
        return linear_reference(x, weight_NK, bias_N)
    out = empty((*x.shape[:-1], outputs), x)
    threads = torch.get_num_threads()
    tasks = -(-outputs * length * x.element_size() // (_BYTES_PER_TASK * threads)) * threads
    per_task = -(-outputs // (tasks * _STRIPE)) * _STRIPE
    kernel(
        -(-outputs // per_task),
        x.data_ptr(),
        weight_NK.data_ptr(),
        0 if bias_N is None else bias_N.data_ptr(),
        out.data_ptr(),
        rows,
        outputs,
        length,
        per_task,
        last,
    )
    return out
