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
from rayllm_kernels.native import Kernel, integer, next_task
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
_BYTES_PER_TASK = 1 << 16  # of weights: 2 to 5 microseconds of reading


def linear_reference(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The contract of `linear`: torch's own, on any device and under autograd."""
    return F.linear(x, weight_NK, bias_N)


def _dot_block(columns: int, *, bf16: bool) -> Any:
    """Intrinsic: 4 weight rows times `columns` float32 rows of x -> float32 [4, columns] at `out`.

    Arguments: weight, x, length of a row (a multiple of the lanes), out. Fetches the next 4 weight rows meanwhile:
    left to itself the hardware starts anew at each row's end and reaches two thirds of the bandwidth.
    """
    item = 2 if bf16 else 4
    emit_weight = emit_load_bf16 if bf16 else emit_load

    @operation(types.void, types.int64, types.int64, types.int64, types.int64)
    def emit(builder: Any, weight: Any, x: Any, length: Any, out: Any) -> Any:
        int64 = ir.IntType(64)

        def row(start: Any, number: int, bytes_per_item: int) -> Any:
            return builder.add(start, builder.mul(length, int64(number * bytes_per_item)))

        sums = [[cgutils.alloca_once_value(builder, splat(0.0, FLOATS)) for _ in range(columns)] for _ in range(_BLOCK)]
        with cgutils.for_range(builder, builder.udiv(length, int64(LANES))) as loop:
            at = builder.mul(loop.index, int64(LANES))
            step, x_step = builder.mul(at, int64(item)), builder.mul(at, int64(4))
            values = [emit_load(builder, builder.add(row(x, c, 4), x_step)) for c in range(columns)]
            for r in range(_BLOCK):
                emit_prefetch(builder, builder.add(row(weight, r + _BLOCK, item), step))
                wide = emit_weight(builder, builder.add(row(weight, r, item), step))
                for total, value in zip(sums[r], values, strict=True):
                    builder.store(emit_fma(builder, wide, value, builder.load(total)), total)
        for i, total in enumerate(total for totals in sums for total in totals):
            target = pointer(builder, builder.add(out, int64(4 * i)), ir.FloatType())
            builder.store(emit_sum_lanes(builder, builder.load(total)), target)

    return emit


_dot_bf16_1, _dot_bf16_4 = _dot_block(1, bf16=True), _dot_block(4, bf16=True)
_dot_f32_1, _dot_f32_4 = _dot_block(1, bf16=False), _dot_block(4, bf16=False)


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
    """Kernel: task = some weight rows, a multiple of 4. `bias` 0: none."""
    x, weight, bias, out = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    rows, outputs, length = integer(block, 4), integer(block, 5), integer(block, 6)
    outputs_per_task, is_bf16 = integer(block, 7), integer(block, 8)
    item = 2 if is_bf16 else 4
    columns = 1 if rows == 1 else 4
    padded = (rows + columns - 1) // columns * columns
    scratch = np.zeros(padded * length + _BLOCK * _BLOCK, np.float32)
    wide = scratch.ctypes.data
    sums = wide + 4 * padded * length
    for i in range(0, rows * length, LANES):
        store(wide + 4 * i, load_bf16(x + 2 * i) if is_bf16 else load(x + 4 * i))
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for start in range(first, min(outputs, first + outputs_per_task), _BLOCK):
            n = min(start, outputs - _BLOCK)  # the last block overlaps the one before where 4 does not divide
            for m in range(0, rows, columns):
                _dot(weight + n * length * item, wide + 4 * m * length, length, sums, columns, is_bf16)
                for r in range(_BLOCK):
                    for c in range(min(columns, rows - m)):
                        value = load_f32(sums + 4 * (r * columns + c))
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

_TILE = 16  # weight rows, and rows of x, of one tile
_PAIRS = 16  # of bfloat16 along the length of one tile
_zero_0, _zero_1, _zero_2, _zero_3 = (tile_zero(i) for i in range(4))
_store_0, _store_1, _store_2, _store_3 = (tile_store(i) for i in range(4))
_load_weights, _load_x = tile_load(4), tile_load(5)
_dot_0, _dot_1, _dot_2, _dot_3 = (tile_dot_bf16(i, 4, 5) for i in range(4))


@inlined
def _pack(x: int, rows: int, length: int, zeros: int, packed: int) -> None:
    """x [rows <= 16, length] of bfloat16 -> pairs along the length by row [length / 2, 16], rows past the end zero."""
    for pair in range(0, length // 2, _PAIRS):
        transpose(x + 4 * pair, 2 * length, rows, zeros, packed + 64 * pair)


@inlined
def _sum_tiles(weight: int, packed: int, length: int, tiles: int, sums: int) -> None:
    """16 weight rows times `tiles` <= 4 groups of 16 packed rows of x -> float32 [tiles, 16 weight rows, 16]."""
    _zero_0()
    _zero_1()
    _zero_2()
    _zero_3()
    for k in range(0, length, 2 * _PAIRS):
        _load_weights(weight + 2 * k, 2 * length)
        part = packed + 32 * k
        _load_x(part, 64)
        _dot_0()
        if tiles > 1:
            _load_x(part + 32 * length, 64)
            _dot_1()
        if tiles > 2:
            _load_x(part + 64 * length, 64)
            _dot_2()
        if tiles > 3:
            _load_x(part + 96 * length, 64)
            _dot_3()
    _store_0(sums, 64)
    if tiles > 1:
        _store_1(sums + 1024, 64)
    if tiles > 2:
        _store_2(sums + 2048, 64)
    if tiles > 3:
        _store_3(sums + 3072, 64)


def _multiply_tiles(block: int) -> None:
    """Kernel: task = some weight rows, a multiple of 16. bfloat16, up to 64 rows of x. `bias` 0: none."""
    x, weight, bias, out = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    rows, outputs, length = integer(block, 4), integer(block, 5), integer(block, 6)
    outputs_per_task, tile_config = integer(block, 7), integer(block, 8)
    tiles = (rows + _TILE - 1) // _TILE
    scratch = np.empty(tiles * (length // 2 * _TILE + 256) + 256 + 2 * LANES, np.float32)
    packed = (scratch.ctypes.data + 63) // 64 * 64
    sums = packed + 32 * tiles * length
    turned = sums + 1024 * tiles
    zeros = turned + 1024
    store(zeros, broadcast(np.float32(0.0)))
    for tile in range(tiles):
        group = min(_TILE, rows - tile * _TILE)
        _pack(x + 2 * tile * _TILE * length, group, length, zeros, packed + 32 * tile * length)
    load_tile_config(tile_config)
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for n in range(first, min(outputs, first + outputs_per_task), _TILE):
            _sum_tiles(weight + 2 * n * length, packed, length, tiles, sums)
            offset = load_bf16(bias + 2 * n) if bias != 0 else broadcast(np.float32(0.0))
            for tile in range(tiles):
                transpose(sums + 1024 * tile, 64, _TILE, zeros, turned)
                for m in range(min(_TILE, rows - tile * _TILE)):
                    target = out + 2 * ((tile * _TILE + m) * outputs + n)
                    store_bf16(target, add(load(turned + 64 * m), offset))
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
        or x.device.type != "cpu"
        or x.dtype != weight_NK.dtype
        or not (x.is_contiguous() and weight_NK.is_contiguous() and (bias_N is None or bias_N.is_contiguous()))
    ):
        return linear_reference(x, weight_NK, bias_N)
    limits, bf16 = linear_limits(), x.dtype == torch.bfloat16
    if bf16 and limits.vector_bfloat16 < rows <= limits.tile_bfloat16 and outputs % 16 == length % 32 == 0:
        out = x.new_empty((*x.shape[:-1], outputs))
        _launch(_multiply_tiles_kernel, x, weight_NK, bias_N, out, rows, TILE_CONFIG)
    elif (
        rows <= (limits.vector_bfloat16 if bf16 else limits.vector_float32 if x.dtype == torch.float32 else 0)
        and outputs >= _BLOCK
        and length % LANES == 0
    ):
        out = x.new_empty((*x.shape[:-1], outputs))
        _launch(_multiply_vectors_kernel, x, weight_NK, bias_N, out, rows, bf16)
    else:
        return linear_reference(x, weight_NK, bias_N)
    return out


def _launch(kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, rows: int, last: int) -> None:
    outputs, length = weight.shape
    per_task = max(16, _BYTES_PER_TASK // (length * weight.element_size()) // 16 * 16)
    kernel(
        -(-outputs // per_task),
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        outputs,
        length,
        per_task,
        last,
    )
