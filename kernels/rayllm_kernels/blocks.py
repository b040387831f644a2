"""The inner products that the linear kernels are made of, callable inside numba-compiled code.

Three kinds. Vectors: some weight rows times some rows of x along their whole length, the sums in registers. Tiles: 32
weight rows times 16 or 32 packed rows of x in AMX registers. Either reads the weight where it lies, row by row, and
adds up every sum in the same order whatever the block's shape. Panels: int8 weights that were packed once, 32 outputs
side by side, times up to 12 packed rows of x. Knows nothing of scales, biases or dtypes of results.
"""

from collections.abc import Callable
from typing import Any, Literal

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils, config

from rayllm_kernels.amx import tile_dot_bf16, tile_dot_int8, tile_load, tile_store, tile_zero
from rayllm_kernels.simd import (
    BYTES,
    FLOATS,
    INTS,
    LANES,
    call_llvm,
    emit_fma,
    emit_load,
    emit_load_bf16,
    emit_load_i8,
    emit_prefetch,
    emit_sum_lanes,
    inlined,
    load,
    operation,
    pointer,
    prefetch,
    splat,
    store,
    transpose,
)

CACHE_LINE = 64
TILE = 16  # weight rows, rows of x, and groups of 4 bytes along the length, of one tile
PANEL = 32  # outputs that lie side by side in packed weights: two vectors of sums
PANEL_ROWS = 12  # of x: with them 24 vectors of sums, and the weights, fill the 32 registers
STRIPE = 32  # weight rows multiplied at a time: with one tile, each product would wait for the one before
_AHEAD = 8192  # bytes

_LOADS = {"float32": (4, emit_load), "bfloat16": (2, emit_load_bf16), "int8": (1, emit_load_i8)}


def dot_floats(rows: int, columns: int, weight: Literal["float32", "bfloat16", "int8"]) -> Any:
    """Intrinsic: `rows` weight rows times `columns` float32 rows of x -> float32 [rows, columns] at `out`.

    Arguments: weight, x, length of a row (whole cache lines of weights), out. Fetches weights into the second-level
    cache ahead of their use: left to itself the hardware starts anew at each page and reaches two thirds of the
    bandwidth.
    """
    item, emit_weight = _LOADS[weight]
    per_line = CACHE_LINE // item

    @operation(types.void, types.int64, types.int64, types.int64, types.int64)
    def emit(builder: Any, weight: Any, x: Any, length: Any, out: Any) -> Any:
        int64 = ir.IntType(64)
        pitch = builder.mul(length, int64(item))
        starts = [builder.add(weight, builder.mul(pitch, int64(r))) for r in range(rows)]
        vectors = [builder.add(x, builder.mul(length, int64(4 * c))) for c in range(columns)]
        ahead = int64(_AHEAD) if rows == 1 else builder.mul(pitch, int64(rows))
        sums = [[cgutils.alloca_once_value(builder, splat(0.0, FLOATS)) for _ in vectors] for _ in starts]
        with cgutils.for_range(builder, builder.udiv(length, int64(per_line))) as loop:
            line = builder.mul(loop.index, int64(CACHE_LINE))
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


def _dot_instruction() -> str | None:
    """The LLVM intrinsic of this processor that multiplies unsigned with signed bytes and adds up fours of them."""
    features = {} if config.CPU_NAME or config.CPU_FEATURES else binding.get_host_cpu_features()
    if features.get("avx512vnni"):
        return "llvm.x86.avx512.vpdpbusd.512"
    if features.get("avxvnni"):
        return "llvm.x86.avx512.vpdpbusd.256"
    return None


_DOT_INSTRUCTION = _dot_instruction()
PANELS_RUN = _DOT_INSTRUCTION == "llvm.x86.avx512.vpdpbusd.512"  # AVX2 has half the registers
# Weights are made unsigned for it by adding 128, so the sums come out too large by 128 times the sum of x.
DOT_OFFSET = 128 if _DOT_INSTRUCTION else 0


def _emit_dot_bytes(builder: Any, weight: Any, x: Any, total: Any) -> Any:
    """Two <64 x i8> -> total <16 x i32> plus products in fours; `weight` as `_emit_weight_bytes` gives it."""
    if _DOT_INSTRUCTION == "llvm.x86.avx512.vpdpbusd.512":
        return call_llvm(
            builder, _DOT_INSTRUCTION, INTS, total, builder.bitcast(weight, INTS), builder.bitcast(x, INTS)
        )
    if _DOT_INSTRUCTION is not None:
        half = ir.VectorType(ir.IntType(32), LANES // 2)
        parts = []
        for first in (0, LANES // 2):
            index = ir.Constant(half, list(range(first, first + LANES // 2)))
            operands = [builder.bitcast(one, INTS) for one in (weight, x)]
            lanes = [builder.shuffle_vector(one, one, index) for one in (total, *operands)]
            parts.append(call_llvm(builder, _DOT_INSTRUCTION, half, *lanes))
        return builder.shuffle_vector(*parts, ir.Constant(INTS, list(range(LANES))))
    wide = ir.VectorType(ir.IntType(16), 4 * LANES)
    products = builder.mul(builder.sext(weight, wide), builder.sext(x, wide))  # at most 128 * 127: fits 16 bits
    pair = ir.VectorType(ir.IntType(32), 2 * LANES)
    for vector, kind in ((pair, 2 * LANES), (INTS, LANES)):
        even, odd = (
            builder.shuffle_vector(products, products, ir.Constant(ir.VectorType(ir.IntType(32), kind), index))
            for index in (list(range(0, 2 * kind, 2)), list(range(1, 2 * kind, 2)))
        )
        if vector is pair:
            even, odd = builder.sext(even, pair), builder.sext(odd, pair)
        products = builder.add(even, odd)
    return builder.add(total, products)


def _emit_load_bytes(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address, BYTES), align=1)


def _emit_weight_bytes(builder: Any, address: Any) -> Any:
    weight = _emit_load_bytes(builder, address)
    return builder.xor(weight, ir.Constant(BYTES, [-128] * 4 * LANES)) if DOT_OFFSET else weight


def dot_bytes(rows: int, columns: int) -> Any:
    """Intrinsic: `rows` int8 weight rows times `columns` int8 rows of x -> int32 at `out` + 64 * column + 4 * row.

    Arguments: weight, x, length of a row (whole cache lines), starts, out. `starts`: for each row of x 16 int32 whose
    sum the result begins with: `DOT_OFFSET` times the sum of the row, negative, and zeros.
    """

    @operation(types.void, types.int64, types.int64, types.int64, types.int64, types.int64)
    def emit(builder: Any, weight: Any, x: Any, length: Any, starts: Any, out: Any) -> Any:
        int64 = ir.IntType(64)
        weights = [builder.add(weight, builder.mul(length, int64(r))) for r in range(rows)]
        vectors = [builder.add(x, builder.mul(length, int64(c))) for c in range(columns)]
        first = [
            builder.load(pointer(builder, builder.add(starts, int64(64 * c)), INTS), align=4) for c in range(columns)
        ]
        ahead = int64(_AHEAD)
        sums = [[cgutils.alloca_once_value(builder, start) for start in first] for _ in weights]
        with cgutils.for_range(builder, builder.udiv(length, int64(CACHE_LINE))) as loop:
            line = builder.mul(loop.index, int64(CACHE_LINE))
            for start in weights:
                emit_prefetch(builder, builder.add(builder.add(start, line), ahead))
            values = [_emit_load_bytes(builder, builder.add(vector, line)) for vector in vectors]
            for start, totals in zip(weights, sums, strict=True):
                row = _emit_weight_bytes(builder, builder.add(start, line))
                for value, total in zip(values, totals, strict=True):
                    builder.store(_emit_dot_bytes(builder, row, value, builder.load(total)), total)
        for r, totals in enumerate(sums):
            for c, total in enumerate(totals):
                value = call_llvm(builder, "llvm.vector.reduce.add.v16i32", ir.IntType(32), builder.load(total))
                builder.store(value, pointer(builder, builder.add(out, int64(64 * c + 4 * r)), ir.IntType(32)))

    return emit


def dot_panel(rows: int) -> Any:
    """Intrinsic: a panel of packed weights times `rows` packed rows of x -> int32 [rows, 32 outputs] at `out`.

    Arguments: weight [length / 4, 32 outputs, 4], made unsigned by adding `DOT_OFFSET`; x as `pack` writes it; length
    of a row (a multiple of 16); starts, int32 for each row: `DOT_OFFSET` times its sum, negative; out. A panel lies in
    one piece and the next behind it, so what is fetched ahead at the end of one is the beginning of the other.
    """
    unrolled, halves = 4, PANEL // LANES

    @operation(types.void, types.int64, types.int64, types.int64, types.int64, types.int64)
    def emit(builder: Any, weight: Any, x: Any, length: Any, starts: Any, out: Any) -> Any:
        def at(address: Any, offset: int) -> Any:
            return builder.add(address, ir.IntType(64)(offset))

        def broadcast(address: Any) -> Any:
            value = builder.load(pointer(builder, address, ir.IntType(32)))
            first = builder.insert_element(ir.Constant(INTS, ir.Undefined), value, ir.IntType(32)(0))
            return builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))

        def fours(address: Any) -> Any:
            return builder.bitcast(broadcast(address), BYTES)

        sums = [
            [cgutils.alloca_once_value(builder, start) for _ in range(halves)]
            for start in (broadcast(at(starts, 4 * r)) for r in range(rows))
        ]
        with cgutils.for_range(builder, builder.udiv(length, ir.IntType(64)(4 * unrolled))) as loop:
            panel = builder.add(weight, builder.mul(loop.index, ir.IntType(64)(4 * PANEL * unrolled)))
            group = builder.add(x, builder.mul(loop.index, ir.IntType(64)(CACHE_LINE * unrolled)))
            for line in range(0, 4 * PANEL * unrolled, CACHE_LINE):
                emit_prefetch(builder, at(panel, line + _AHEAD))
            for step in range(unrolled):
                columns = [
                    _emit_load_bytes(builder, at(panel, 4 * PANEL * step + CACHE_LINE * half)) for half in range(halves)
                ]
                for r, totals in enumerate(sums):
                    value = fours(at(group, CACHE_LINE * step + 4 * r))
                    for column, total in zip(columns, totals, strict=True):
                        builder.store(_emit_dot_bytes(builder, column, value, builder.load(total)), total)
        for i, total in enumerate(total for totals in sums for total in totals):
            builder.store(builder.load(total), pointer(builder, at(out, 4 * LANES * i), INTS), align=4)

    return emit


@inlined
def pack(x: int, rows: int, pitch: int, zeros: int, packed: int) -> None:
    """x [rows <= 16, pitch bytes] -> its groups of 4 bytes [pitch / 4, 16 rows], rows past the end zero.

    `zeros`: 64 of them. That is how AMX wants its second operand, for pairs of bfloat16 and for fours of int8.
    """
    for group in range(0, pitch // 4, TILE):
        transpose(x + 4 * group, pitch, rows, zeros, packed + 64 * group)


@inlined
def gather_stripe(weight: int, pitch: int, length: int, gathered: int) -> None:
    """`length` bytes of 32 weight rows -> [length / 64, 32, 64]: no two lines of a tile meet in one set of the cache.

    Fetches the same part of the next 32 rows into the second-level cache.
    """
    for r in range(STRIPE):
        row = weight + r * pitch
        for k in range(0, length, CACHE_LINE):
            prefetch(row + STRIPE * pitch + k)
            store(gathered + STRIPE * k + CACHE_LINE * r, load(row + k))


def sum_stripe(tile_dot: Callable[[int, int, int], Any]) -> Any:
    """A helper: 32 weight rows times 16 packed rows of x, or twice 16 -> [left and right, 32 weight rows, 16] at sums.

    Arguments: weight, bytes from one of its rows to the next, bytes from 64 bytes of a row to the next 64, left, right
    (0: none), bytes of a weight row to multiply (a multiple of 64), sums (of 4 bytes), whether to go on from what is
    there, the weights to fetch meanwhile into the second-level cache (0: none).
    """
    zero_0, zero_1, zero_2, zero_3 = (tile_zero(i) for i in range(4))
    store_0, store_1, store_2, store_3 = (tile_store(i) for i in range(4))
    load_0, load_1, load_2, load_3 = (tile_load(i) for i in range(4))
    load_upper, load_lower, load_left, load_right = (tile_load(i) for i in range(4, 8))
    dot_upper_left, dot_lower_left = tile_dot(0, 4, 6), tile_dot(1, 5, 6)
    dot_upper_right, dot_lower_right = tile_dot(2, 4, 7), tile_dot(3, 5, 7)

    @inlined
    def multiply(
        weight: int, pitch: int, step: int, left: int, right: int, length: int, sums: int, resume: int, ahead: int
    ) -> None:
        if resume != 0:
            load_0(sums, 64)
            load_1(sums + 1024, 64)
            if right != 0:
                load_2(sums + 2048, 64)
                load_3(sums + 3072, 64)
        else:
            zero_0()
            zero_1()
            zero_2()
            zero_3()
        upper, lower = weight, weight + TILE * pitch
        for k in range(0, length, CACHE_LINE):
            if ahead != 0:
                for line in range(STRIPE):
                    prefetch(ahead + STRIPE * k + CACHE_LINE * line)
            load_left(left + 16 * k, 64)
            load_upper(upper, pitch)
            dot_upper_left()
            load_lower(lower, pitch)
            dot_lower_left()
            if right != 0:
                load_right(right + 16 * k, 64)
                dot_upper_right()
                dot_lower_right()
            upper += step
            lower += step
        store_0(sums, 64)
        store_1(sums + 1024, 64)
        if right != 0:
            store_2(sums + 2048, 64)
            store_3(sums + 3072, 64)

    return multiply


sum_stripe_bf16, sum_stripe_int8 = sum_stripe(tile_dot_bf16), sum_stripe(tile_dot_int8)
