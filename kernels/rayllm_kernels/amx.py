"""The tile registers of Intel's AMX, callable inside numba-compiled code.

Eight tiles of 16 rows by 64 bytes. A tile number must be a literal. `TILE_CONFIG` is the address of the configuration
that makes all eight full; a thread loads it before its first tile and releases it after its last, since torch's own
products configure tiles too. Knows nothing of what is multiplied.
"""

import ctypes
import platform
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import config

from rayllm_kernels.simd import call_llvm, operation

_BYTE_POINTER = ir.PointerType(ir.IntType(8))
_CONFIG = (ctypes.c_uint8 * 64)(1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8)  # palette, widths, rows
TILE_CONFIG = ctypes.addressof(_CONFIG)


def amx_problem() -> str | None:
    """Why this process cannot multiply bfloat16 and int8 tiles, None if it can. Asks Linux for the right to them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "not Linux on x86-64"
    if config.CPU_NAME or config.CPU_FEATURES:
        return "numba is told to compile for another processor"
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "amx-int8")):
        return "the processor has no AMX tiles"
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    if ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) != 0:
        return "the kernel refuses AMX tiles"
    return None


def _byte(value: int) -> Any:
    return ir.IntType(8)(value)


@operation(types.void, types.int64)
def load_tile_config(builder: Any, address: Any) -> Any:
    return call_llvm(builder, "llvm.x86.ldtilecfg", ir.VoidType(), builder.inttoptr(address, _BYTE_POINTER))


@operation(types.void)
def release_tiles(builder: Any) -> Any:
    return call_llvm(builder, "llvm.x86.tilerelease", ir.VoidType())


def tile_zero(tile: int) -> Any:
    @operation(types.void)
    def emit(builder: Any) -> Any:
        return call_llvm(builder, "llvm.x86.tilezero", ir.VoidType(), _byte(tile))

    return emit


def tile_load(tile: int) -> Any:
    """(address, bytes from one row to the next)"""

    @operation(types.void, types.int64, types.int64)
    def emit(builder: Any, address: Any, pitch: Any) -> Any:
        pointer = builder.inttoptr(address, _BYTE_POINTER)
        return call_llvm(builder, "llvm.x86.tileloadd64", ir.VoidType(), _byte(tile), pointer, pitch)

    return emit


def tile_store(tile: int) -> Any:
    """(address, bytes from one row to the next)"""

    @operation(types.void, types.int64, types.int64)
    def emit(builder: Any, address: Any, pitch: Any) -> Any:
        pointer = builder.inttoptr(address, _BYTE_POINTER)
        return call_llvm(builder, "llvm.x86.tilestored64", ir.VoidType(), _byte(tile), pointer, pitch)

    return emit


def tile_dot_bf16(total: int, a: int, b: int) -> Any:
    """total[i, j] += sum over p < 16 of a[i, 2p] * b[p, 2j] + a[i, 2p + 1] * b[p, 2j + 1], float32 += bfloat16."""

    @operation(types.void)
    def emit(builder: Any) -> Any:
        return call_llvm(builder, "llvm.x86.tdpbf16ps", ir.VoidType(), _byte(total), _byte(a), _byte(b))

    return emit


def tile_dot_int8(total: int, a: int, b: int) -> Any:
    """total[i, j] += sum over p < 16, q < 4 of a[i, 4p + q] * b[p, 4j + q], int32 += int8."""

    @operation(types.void)
    def emit(builder: Any) -> Any:
        return call_llvm(builder, "llvm.x86.tdpbssd", ir.VoidType(), _byte(total), _byte(a), _byte(b))

    return emit
