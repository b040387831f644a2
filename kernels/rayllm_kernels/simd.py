"""A 16-lane float32 vector for compiled CPU loops, and the few scalar operations that numba lacks.

Everything here is callable only inside numba-compiled code. Memory is addressed by plain integers (bytes): bfloat16
tensors have no numpy view, and building numpy arrays would cost more than the small kernels themselves. A vector is
LLVM's `<16 x float>`: one AVX-512 register, two AVX2 or four NEON ones, without a change here.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic, models, register_model

LANES = 16

F = TypeVar("F", bound=Callable[..., Any])


class F32x16:
    """A vector, as the type checker sees it."""


class _VectorType(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="f32x16")


VECTOR = _VectorType()
FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)
BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)  # as many bytes as the others have
_FEW_BYTES = ir.VectorType(ir.IntType(8), LANES)
_INT32 = ir.IntType(32)


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, FLOATS)


def inlined(function: F) -> F:
    """Compile a helper that kernels call; it becomes part of their code."""
    return cast(F, njit(error_model="numpy", forceinline=True)(function))


def operation(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic of numba types `parameters` -> `result` from a function (builder, *values) that emits LLVM."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def typer(_typing_context: Any, *_arguments: Any) -> Any:
            def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
                value = emit(builder, *values)
                return context.get_dummy_value() if result == types.void else value

            return result(*parameters), codegen

        # numba matches arguments against the typer's signature, less its first parameter: give it the emitter's.
        typer.__name__, typer.__signature__ = emit.__name__, inspect.signature(emit)  # type: ignore[attr-defined]
        return intrinsic(typer)

    return decorate


def splat(constant: float | int, vector: Any) -> Any:
    return ir.Constant(vector, [constant] * LANES)


def pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(element))


def call_llvm(builder: Any, name: str, result: Any, *values: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """Call an LLVM intrinsic that is overloaded on its result type or first vector."""
    function_type = ir.FunctionType(result, [value.type for value in values])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, values, fastmath=fastmath)


# Scalars. Sizes in the names; addresses are int64.


@operation(types.int64, types.int64)
def load_i64(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address, ir.IntType(64)))


@operation(types.int32, types.int64)
def load_i32(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address, _INT32))


@operation(types.float64, types.int64)
def load_f64(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address, ir.DoubleType()))


@operation(types.float32, types.int64)
def load_f32(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address, ir.FloatType()))


@operation(types.void, types.int64, types.float32)
def store_f32(builder: Any, address: Any, value: Any) -> Any:
    return builder.store(value, pointer(builder, address, ir.FloatType()))


@operation(types.void, types.int64, types.int64)
def store_i64(builder: Any, address: Any, value: Any) -> Any:
    return builder.store(value, pointer(builder, address, ir.IntType(64)))


@operation(types.void, types.int64, types.int32)
def store_i32(builder: Any, address: Any, value: Any) -> Any:
    return builder.store(value, pointer(builder, address, _INT32))


@operation(types.void, types.int64, types.float32)
def store_bf16_scalar(builder: Any, address: Any, value: Any) -> Any:
    """Store the nearest bfloat16, ties to even; a NaN stays one by setting its quiet bit."""
    short, bits = ir.IntType(16), builder.bitcast(value, _INT32)
    odd = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
    rounded = builder.add(builder.add(bits, _INT32(0x7FFF)), odd)
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), builder.or_(bits, _INT32(0x400000)), rounded)
    return builder.store(builder.trunc(builder.lshr(chosen, _INT32(16)), short), pointer(builder, address, short))


@operation(types.float32, types.int64)
def load_f32_from_bf16(builder: Any, address: Any) -> Any:
    short = builder.load(pointer(builder, address, ir.IntType(16)))
    return builder.bitcast(builder.shl(builder.zext(short, _INT32), _INT32(16)), ir.FloatType())


@operation(types.int64, types.int64)
def fetch_increment(builder: Any, address: Any) -> Any:
    """Atomic post-increment of the int64 at `address`."""
    return builder.atomic_rmw("add", pointer(builder, address, ir.IntType(64)), ir.IntType(64)(1), "monotonic")


def emit_prefetch(builder: Any, address: Any) -> Any:
    """Ask for the cache line of `address`, which need not be readable."""
    return call_llvm(
        builder,
        "llvm.prefetch.p0i8",
        ir.VoidType(),
        builder.inttoptr(address, ir.PointerType(ir.IntType(8))),
        _INT32(0),  # to read
        _INT32(2),  # from the second level on: fetching into the first is a third slower
        _INT32(1),  # data
    )


prefetch = operation(types.void, types.int64)(emit_prefetch)


@operation(types.void, types.int64)
def prefetch_to_write(builder: Any, address: Any) -> Any:
    """Ask for the cache line of `address` as the only owner: a store to it need not wait for other memory's content."""
    byte_pointer = builder.inttoptr(address, ir.PointerType(ir.IntType(8)))
    return call_llvm(builder, "llvm.prefetch.p0i8", ir.VoidType(), byte_pointer, _INT32(1), _INT32(3), _INT32(1))


# Vectors.


@operation(VECTOR, types.float32)
def broadcast(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))


def emit_load(builder: Any, address: Any) -> Any:
    return builder.load(pointer(builder, address, FLOATS), align=4)


load = operation(VECTOR, types.int64)(emit_load)


@operation(types.void, types.int64, VECTOR)
def store(builder: Any, address: Any, vector: Any) -> Any:
    return builder.store(vector, pointer(builder, address, FLOATS), align=4)


def emit_load_bf16(builder: Any, address: Any) -> Any:
    shorts = builder.load(pointer(builder, address, SHORTS), align=2)
    return builder.bitcast(builder.shl(builder.zext(shorts, INTS), splat(16, INTS)), FLOATS)


load_bf16 = operation(VECTOR, types.int64)(emit_load_bf16)


def emit_load_i8(builder: Any, address: Any) -> Any:
    few = builder.load(pointer(builder, address, _FEW_BYTES), align=1)
    return builder.sitofp(builder.sext(few, INTS), FLOATS)


load_i8 = operation(VECTOR, types.int64)(emit_load_i8)


@operation(types.void, types.int64, VECTOR)
def store_i8(builder: Any, address: Any, vector: Any) -> Any:
    """Integers from -128 to 127, as `rint` gives them; what others become is undefined."""
    few = builder.trunc(builder.fptosi(vector, INTS), _FEW_BYTES)
    return builder.store(few, pointer(builder, address, _FEW_BYTES), align=1)


@operation(VECTOR, types.int64)
def load_f32_from_i32(builder: Any, address: Any) -> Any:
    return builder.sitofp(builder.load(pointer(builder, address, INTS), align=4), FLOATS)


def _round_to_bf16(builder: Any, vector: Any) -> Any:
    """Bits of the nearest bfloat16 (ties to even) in the upper half; a NaN stays one by setting its quiet bit."""
    bits = builder.bitcast(vector, INTS)
    odd = builder.and_(builder.lshr(bits, splat(16, INTS)), splat(1, INTS))
    rounded = builder.add(builder.add(bits, splat(0x7FFF, INTS)), odd)
    quiet = builder.or_(bits, splat(0x400000, INTS))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    return builder.select(is_nan, quiet, rounded)


@operation(types.void, types.int64, VECTOR)
def store_bf16(builder: Any, address: Any, vector: Any) -> Any:
    upper = builder.lshr(_round_to_bf16(builder, vector), splat(16, INTS))
    return builder.store(builder.trunc(upper, SHORTS), pointer(builder, address, SHORTS), align=2)


@operation(types.void, types.int64, VECTOR)
def store_bf16_exact(builder: Any, address: Any, vector: Any) -> Any:
    """Values that bfloat16 can hold."""
    upper = builder.lshr(builder.bitcast(vector, INTS), splat(16, INTS))
    return builder.store(builder.trunc(upper, SHORTS), pointer(builder, address, SHORTS), align=2)


@operation(VECTOR, VECTOR, VECTOR)
def join_bf16(builder: Any, low: Any, high: Any) -> Any:
    """16 pairs of the nearest bfloat16, as bits. NaN stays NaN if its lower half is zero: one that bfloat16 made."""
    rounded = []
    for vector in (low, high):
        bits = builder.bitcast(vector, INTS)
        odd = builder.and_(builder.lshr(bits, splat(16, INTS)), splat(1, INTS))
        rounded.append(builder.add(builder.add(bits, splat(0x7FFF, INTS)), odd))
    upper = builder.and_(rounded[1], splat(0xFFFF0000, INTS))
    return builder.bitcast(builder.or_(builder.lshr(rounded[0], splat(16, INTS)), upper), FLOATS)


@operation(VECTOR, VECTOR)
def round_bf16(builder: Any, vector: Any) -> Any:
    """The nearest values that bfloat16 can hold, still as float32."""
    upper = builder.and_(_round_to_bf16(builder, vector), splat(0xFFFF0000, INTS))
    return builder.bitcast(upper, FLOATS)


@operation(VECTOR, VECTOR, VECTOR)
def add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


@operation(VECTOR, VECTOR, VECTOR)
def sub(builder: Any, a: Any, b: Any) -> Any:
    return builder.fsub(a, b)


@operation(VECTOR, VECTOR, VECTOR)
def mul(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b)


@operation(VECTOR, VECTOR, VECTOR)
def div(builder: Any, a: Any, b: Any) -> Any:
    return builder.fdiv(a, b)


@operation(VECTOR, VECTOR)
def rint(builder: Any, x: Any) -> Any:
    """The nearest integer, ties to even."""
    return call_llvm(builder, "llvm.rint.v16f32", FLOATS, x)


@operation(VECTOR, VECTOR, VECTOR)
def max_abs(builder: Any, total: Any, x: Any) -> Any:
    """The larger of total, not negative, and |x|, lane by lane; NaN is larger than anything."""
    bits = builder.and_(builder.bitcast(x, INTS), splat(0x7FFFFFFF, INTS))
    so_far = builder.bitcast(total, INTS)  # the order of non-negative floats is that of their bits
    return builder.bitcast(builder.select(builder.icmp_signed(">", bits, so_far), bits, so_far), FLOATS)


@operation(VECTOR, VECTOR, VECTOR)
def larger(builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane; b where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@operation(types.float32, VECTOR)
def max_abs_lanes(builder: Any, vector: Any) -> Any:
    """The largest lane of what `max_abs` gives, NaN if there is one."""
    bits = builder.bitcast(vector, INTS)
    return builder.bitcast(call_llvm(builder, "llvm.vector.reduce.smax.v16i32", _INT32, bits), ir.FloatType())


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c; fused where the machine can, as two operations where it would be a library call."""
    return call_llvm(builder, "llvm.fmuladd.v16f32", FLOATS, a, b, c)


fma = operation(VECTOR, VECTOR, VECTOR, VECTOR)(emit_fma)


def emit_sum_lanes(builder: Any, vector: Any) -> Any:
    return call_llvm(
        builder, "llvm.vector.reduce.fadd.v16f32", ir.FloatType(), ir.FloatType()(0.0), vector, fastmath=("reassoc",)
    )


sum_lanes = operation(types.float32, VECTOR)(emit_sum_lanes)


@operation(types.float32, VECTOR)
def max_lanes(builder: Any, vector: Any) -> Any:
    """The largest lane; NaN lanes may win or lose. (LLVM's own reduction calls a library function for each lane.)"""
    for half in (8, 4, 2, 1):
        upper = [lane + half if lane < half else lane for lane in range(LANES)]
        other = builder.shuffle_vector(vector, vector, ir.Constant(INTS, upper))
        vector = builder.select(builder.fcmp_ordered(">", vector, other), vector, other)
    return builder.extract_element(vector, _INT32(0))


@operation(VECTOR, VECTOR)
def exp(builder: Any, x: Any) -> Any:
    """e**x to 2 units in the last place for -87 <= x <= 88, 0 below, infinity above, NaN for NaN.

    2**n * e**r with n = round(x / ln 2) and Cephes' polynomial for e**r, |r| <= ln 2 / 2.
    """

    def constant(value: float) -> Any:
        return splat(value, FLOATS)

    def clamp(op: str, value: Any, limit: float) -> Any:
        return builder.select(builder.fcmp_ordered(op, value, constant(limit)), value, constant(limit))

    clamped = clamp("<", clamp(">", x, -87.0), 88.0)
    n = call_llvm(builder, "llvm.rint.v16f32", FLOATS, builder.fmul(clamped, constant(1.44269504088896341)))
    r = emit_fma(builder, n, constant(-0.693359375), clamped)
    r = emit_fma(builder, n, constant(2.12194440e-4), r)
    p = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = emit_fma(builder, p, r, constant(coefficient))
    p = emit_fma(builder, p, builder.fmul(r, r), builder.fadd(r, constant(1.0)))
    exponent = builder.shl(builder.add(builder.fptosi(n, INTS), splat(127, INTS)), splat(23, INTS))
    value = builder.fmul(p, builder.bitcast(exponent, FLOATS))
    value = builder.select(builder.fcmp_ordered("<", x, constant(-87.0)), constant(0.0), value)
    value = builder.select(builder.fcmp_ordered(">", x, constant(88.0)), constant(float("inf")), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


@operation(types.void, types.int64, types.int64, types.int64, types.int64, types.int64)
def transpose(builder: Any, source: Any, pitch: Any, rows: Any, filler: Any, target: Any) -> Any:
    """A 16 x 16 square of 32-bit values, `pitch` bytes from row to row -> its transpose, contiguous.

    Rows of the source from `rows` on are not read; the 16 values at `filler` stand for each.
    """
    int64 = ir.IntType(64)
    square = []
    for r in range(LANES):
        row = builder.add(source, builder.mul(pitch, int64(r)))
        square.append(emit_load(builder, builder.select(builder.icmp_signed("<", int64(r), rows), row, filler)))
    for distance in (8, 4, 2, 1):  # swap the off-diagonal quarters of ever smaller squares
        upper = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        lower = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        for r in range(LANES):
            if not r & distance:
                a, b = square[r], square[r + distance]
                square[r] = builder.shuffle_vector(a, b, ir.Constant(INTS, upper))
                square[r + distance] = builder.shuffle_vector(a, b, ir.Constant(INTS, lower))
    for r, vector in enumerate(square):
        builder.store(vector, pointer(builder, builder.add(target, int64(4 * LANES * r)), FLOATS), align=4)
