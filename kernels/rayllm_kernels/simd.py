"""A 16-lane float32 vector for compiled CPU loops, and the few scalar operations that numba lacks.

Everything here is callable only inside numba-compiled code. Memory is addressed by plain integers (bytes): bfloat16
tensors have no numpy view, and building numpy arrays would cost more than the small kernels themselves. A vector is
LLVM's `<16 x float>`: one AVX-512 register, two AVX2 or four NEON ones, without a change here.

numba keys its on-disk cache by the file that holds the kernel, not by this one: after an edit here, remove the
`__pycache__/*.nb*` files.
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


_VECTOR = _VectorType()
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_INT32 = ir.IntType(32)


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _FLOATS)


def inlined(function: F) -> F:
    """Compile a helper that kernels call; LLVM inlines it into them."""
    return cast(F, njit(error_model="numpy")(function))


def _operation(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
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


def _splat(constant: float | int, vector: Any) -> Any:
    return ir.Constant(vector, [constant] * LANES)


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(element))


def _call(builder: Any, name: str, result: Any, *values: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """Call an LLVM intrinsic that is overloaded on its result type or first vector."""
    function_type = ir.FunctionType(result, [value.type for value in values])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, values, fastmath=fastmath)


# Scalars. Sizes in the names; addresses are int64.


@_operation(types.int64, types.int64)
def load_i64(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, ir.IntType(64)))


@_operation(types.int32, types.int64)
def load_i32(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, _INT32))


@_operation(types.float64, types.int64)
def load_f64(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, ir.DoubleType()))


@_operation(types.float32, types.int64)
def load_f32(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, ir.FloatType()))


@_operation(types.void, types.int64, types.float32)
def store_f32(builder: Any, address: Any, value: Any) -> Any:
    return builder.store(value, _pointer(builder, address, ir.FloatType()))


@_operation(types.void, types.int64, types.int64)
def store_i64(builder: Any, address: Any, value: Any) -> Any:
    return builder.store(value, _pointer(builder, address, ir.IntType(64)))


@_operation(types.int64, types.int64)
def fetch_increment(builder: Any, address: Any) -> Any:
    """Atomic post-increment of the int64 at `address`."""
    return builder.atomic_rmw("add", _pointer(builder, address, ir.IntType(64)), ir.IntType(64)(1), "monotonic")


# Vectors.


@_operation(_VECTOR, types.float32)
def broadcast(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))


@_operation(_VECTOR, types.int64)
def load(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, _FLOATS), align=4)


@_operation(types.void, types.int64, _VECTOR)
def store(builder: Any, address: Any, vector: Any) -> Any:
    return builder.store(vector, _pointer(builder, address, _FLOATS), align=4)


@_operation(_VECTOR, types.int64)
def load_bf16(builder: Any, address: Any) -> Any:
    shorts = builder.load(_pointer(builder, address, _SHORTS), align=2)
    return builder.bitcast(builder.shl(builder.zext(shorts, _INTS), _splat(16, _INTS)), _FLOATS)


def _round_to_bf16(builder: Any, vector: Any) -> Any:
    """Bits of the nearest bfloat16 (ties to even) in the upper half; a NaN stays one by setting its quiet bit."""
    bits = builder.bitcast(vector, _INTS)
    odd = builder.and_(builder.lshr(bits, _splat(16, _INTS)), _splat(1, _INTS))
    rounded = builder.add(builder.add(bits, _splat(0x7FFF, _INTS)), odd)
    quiet = builder.or_(bits, _splat(0x400000, _INTS))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    return builder.select(is_nan, quiet, rounded)


@_operation(types.void, types.int64, _VECTOR)
def store_bf16(builder: Any, address: Any, vector: Any) -> Any:
    upper = builder.lshr(_round_to_bf16(builder, vector), _splat(16, _INTS))
    return builder.store(builder.trunc(upper, _SHORTS), _pointer(builder, address, _SHORTS), align=2)


@_operation(_VECTOR, _VECTOR)
def round_bf16(builder: Any, vector: Any) -> Any:
    """The nearest values that bfloat16 can hold, still as float32."""
    upper = builder.and_(_round_to_bf16(builder, vector), _splat(0xFFFF0000, _INTS))
    return builder.bitcast(upper, _FLOATS)


@_operation(_VECTOR, _VECTOR, _VECTOR)
def add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


@_operation(_VECTOR, _VECTOR, _VECTOR)
def sub(builder: Any, a: Any, b: Any) -> Any:
    return builder.fsub(a, b)


@_operation(_VECTOR, _VECTOR, _VECTOR)
def mul(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b)


@_operation(_VECTOR, _VECTOR, _VECTOR)
def div(builder: Any, a: Any, b: Any) -> Any:
    return builder.fdiv(a, b)


@_operation(_VECTOR, _VECTOR, _VECTOR, _VECTOR)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c; fused where the machine can, as two operations where it would be a library call."""
    return _call(builder, "llvm.fmuladd.v16f32", _FLOATS, a, b, c)


@_operation(types.float32, _VECTOR)
def sum_lanes(builder: Any, vector: Any) -> Any:
    return _call(
        builder, "llvm.vector.reduce.fadd.v16f32", ir.FloatType(), ir.FloatType()(0.0), vector, fastmath=("reassoc",)
    )


@_operation(types.float32, _VECTOR)
def max_lanes(builder: Any, vector: Any) -> Any:
    """The largest lane, NaN lanes left out."""
    return _call(builder, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), vector)


@_operation(_VECTOR, _VECTOR)
def exp(builder: Any, x: Any) -> Any:
    """e**x to 2 units in the last place for -87 <= x <= 88, 0 below, e**88 above, NaN for NaN.

    2**n * e**r with n = round(x / ln 2) and Cephes' polynomial for e**r, |r| <= ln 2 / 2.
    """

    def constant(value: float) -> Any:
        return _splat(value, _FLOATS)

    def fused(a: Any, b: Any, c: Any) -> Any:
        return _call(builder, "llvm.fmuladd.v16f32", _FLOATS, a, b, c)

    def clamp(op: str, value: Any, limit: float) -> Any:
        return builder.select(builder.fcmp_ordered(op, value, constant(limit)), value, constant(limit))

    clamped = clamp("<", clamp(">", x, -87.0), 88.0)
    n = _call(builder, "llvm.rint.v16f32", _FLOATS, builder.fmul(clamped, constant(1.44269504088896341)))
    r = fused(n, constant(-0.693359375), clamped)
    r = fused(n, constant(2.12194440e-4), r)
    p = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fused(p, r, constant(coefficient))
    p = fused(p, builder.fmul(r, r), builder.fadd(r, constant(1.0)))
    exponent = builder.shl(builder.add(builder.fptosi(n, _INTS), _splat(127, _INTS)), _splat(23, _INTS))
    value = builder.fmul(p, builder.bitcast(exponent, _FLOATS))
    value = builder.select(builder.fcmp_ordered("<", x, constant(-87.0)), constant(0.0), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)
