"""x @ weight.T + bias for few rows of x, at the speed of reading the weight once.

A decode step is little else than such products, and torch's reach half of the memory bandwidth or less on the small
matrices of a small model. Two compiled products: vectors, which widen a block of weight rows to float32 and keep
its sums with up to four rows of x in registers; and AMX tiles, which multiply 16 weight rows with 16 rows of x at a
time. Both read the weight where it lies, in its checkpoint layout, and accumulate in float32. In either, what a row
of x gives does not depend on how many other rows there are. `dispatch` says which serves when.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels.amx import TILE_CONFIG, load_tile_config, release_tiles
from rayllm_kernels.blocks import CACHE_LINE, STRIPE, TILE, dot_floats, pack, sum_stripe_bf16
from rayllm_kernels.dispatch import linear_limits, loops_without_gradient_may_run
from rayllm_kernels.native import Kernel, empty, integer, next_task
from rayllm_kernels.simd import (
    LANES,
    add,
    broadcast,
    inlined,
    load,
    load_bf16,
    load_f32,
    load_f32_from_bf16,
    store,
    store_bf16,
    store_bf16_scalar,
    store_f32,
    transpose,
)

_BLOCK = 4  # weight rows, and rows of x, whose sums the vector product keeps in registers
_BYTES_PER_TASK = 1 << 18  # of weights, about: 10 microseconds of reading


def linear_reference(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The contract of `linear`: torch's own, on any device and under autograd."""
    return F.linear(x, weight_NK, bias_N)


_dot_bf16_1, _dot_bf16_4 = dot_floats(1, 1, "bfloat16"), dot_floats(_BLOCK, _BLOCK, "bfloat16")
_dot_f32_1, _dot_f32_4 = dot_floats(1, 1, "float32"), dot_floats(_BLOCK, _BLOCK, "float32")


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


def _multiply_tiles(block: int) -> None:
    """Kernel: task = some weight rows, a multiple of 32. All bfloat16. `bias` 0: none."""
    x, weight, bias, out = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    rows, outputs, length = integer(block, 4), integer(block, 5), integer(block, 6)
    outputs_per_task, tile_config = integer(block, 7), integer(block, 8)
    tiles = (rows + TILE - 1) // TILE
    scratch = np.empty(tiles * length // 2 * TILE + 1024 + 256 + 2 * LANES, np.float32)
    packed = (scratch.ctypes.data + 63) // 64 * 64
    sums = packed + 32 * tiles * length
    turned = sums + 4096
    zeros = turned + 1024
    store(zeros, broadcast(np.float32(0.0)))
    for tile in range(tiles):
        pack(x + 2 * tile * TILE * length, rows - tile * TILE, 2 * length, zeros, packed + 32 * tile * length)
    load_tile_config(tile_config)
    task = next_task(block)
    while task >= 0:
        first = task * outputs_per_task
        for n in range(first, min(outputs, first + outputs_per_task), STRIPE):
            for tile in range(0, tiles, 2):
                left = packed + 32 * tile * length
                right = left + 32 * length if tile + 1 < tiles else 0
                sum_stripe_bf16(weight + 2 * n * length, 2 * length, CACHE_LINE, left, right, 2 * length, sums, 0, 0)
                for part in range(4 if tile + 1 < tiles else 2):
                    transpose(sums + 1024 * part, 64, TILE, zeros, turned)
                    row, column = (tile + part // 2) * TILE, n + part % 2 * TILE
                    offset = load_bf16(bias + 2 * column) if bias != 0 else broadcast(np.float32(0.0))
                    for m in range(min(TILE, rows - row)):
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
        or not loops_without_gradient_may_run(x)
        or x.dtype != weight_NK.dtype
        or not (x.is_contiguous() and weight_NK.is_contiguous())
        or not (bias_N is None or (bias_N.is_contiguous() and bias_N.dtype == x.dtype))
    ):
        return linear_reference(x, weight_NK, bias_N)
    limits, bf16 = linear_limits(), x.dtype == torch.bfloat16
    if bf16 and limits.vector_bfloat16 < rows <= limits.tile_bfloat16 and outputs % STRIPE == length % 32 == 0:
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
    per_task = -(-outputs // (tasks * STRIPE)) * STRIPE
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
