"""Every launch that the GPU operators make, recorded instead of made: which binary Triton would compile for it.

A binary is decided by the kernel, its compile-time arguments, the type of every other argument, which of them Triton
finds divisible by 16, and the numbers of warps and stages. Triton's own code says so here, for sm_90; no GPU is needed.
"""

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature

from rayllm_kernels import gpu
from rayllm_kernels.gpu.spec import Spec

PROCESSORS = 132  # of an H100
# Numbers of a model by which addresses and counts are divided: they decide what instruction does it, not how many
# values live at once, which is what spills. `divisors_of` has them.
DIVISORS = ("KV_HEADS", "GROUP", "PAGE", "HEADS", "BLOCK_Q")
_IN_JOIN = ("TILE", "MIN_TILES")  # there they are divisors too
_SIZES = {"HEAD_DIM": "BLOCK_E", "SIZE": "BLOCK_D"}  # and what they are padded to
# A program holds all heads of a token: how much that is decides, not which heads
_OF_ALL_HEADS = ("rotary_kernel", "rotary_store_kernel", "store_kernel")
_HEADS = ("HEAD_DIM", "BLOCK_H", "BLOCK_K", "BLOCK_HALF", "BLOCK_E")

Binary = tuple[str, frozenset[tuple[str, object]]]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """`seen`: the value of a compile-time argument, else (type, whether a multiple of 16)."""

    kernel: JITFunction
    seen: dict[str, Any]
    num_warps: int
    num_stages: int


class Recorder:
    """Stands in the place of `launch_kernel` in all modules of `rayllm_kernels.gpu`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[Launch] = []
        for module in pkgutil.iter_modules(gpu.__path__, f"{gpu.__name__}."):
            loaded = importlib.import_module(module.name)
            if hasattr(loaded, "launch_kernel"):
                monkeypatch.setattr(loaded, "launch_kernel", self._record)

    def _record(self, kernel: JITFunction, _grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        bind = _binder(kernel)
        bound, specialization, rest = bind(*arguments, **options)
        seen = {
            name: value if kind == "constexpr" else (kind.replace(" ", ""), value == "D")
            for name, (kind, value) in zip(bound, specialization, strict=True)
        }
        launch = Launch(
            kernel=kernel, seen=seen, num_warps=rest.get("num_warps", 4), num_stages=rest.get("num_stages", 3)
        )
        self.launches.append(launch)


@functools.cache
def _binder(kernel: JITFunction) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))


def launch_of(spec: Spec) -> Launch:
    """What the compile gate builds, as a launch would ask for it."""
    seen = {
        name: spec.constexprs[name] if name in spec.constexprs else (spec.signature[name], name in spec.aligned)
        for name in spec.kernel.arg_names
    }
    return Launch(kernel=spec.kernel, seen=seen, num_warps=spec.num_warps, num_stages=spec.num_stages)


def binary_of(launch: Launch) -> Binary:
    """All that decides it but `DIVISORS`, and how far a row falls short of the columns that a program holds of it."""
    name, seen = launch.kernel.__name__, launch.seen
    if name in _OF_ALL_HEADS:
        return name, frozenset((key, seen[key]) for key in seen if key not in (*DIVISORS, *_HEADS))
    left_out = (*DIVISORS, *_SIZES, *(_IN_JOIN if name == "join_kernel" else ()))
    kept = {key: value for key, value in seen.items() if key not in left_out}
    for size, block in _SIZES.items():
        if block in seen:
            kept[size] = "whole" if seen[size] == seen[block] else "padded"
    return name, frozenset((kept | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}).items())


def divisors_of(launch: Launch) -> set[tuple[str, str, str]]:
    """(kernel, name, kind) of each number that `binary_of` leaves out."""
    return {
        (launch.kernel.__name__, name, _kind(launch.seen[name]))
        for name in DIVISORS
        if name in launch.seen and launch.kernel.__name__ not in _OF_ALL_HEADS
    }


def _kind(number: Any) -> str:
    return "one" if number == 1 else "a power of two" if number & (number - 1) == 0 else "another"


def held_by_a_thread(launch: Launch) -> int:
    """Elements of the larger of its tiles, of a program that holds all heads of a token; of others 0."""
    if launch.kernel.__name__ not in _OF_ALL_HEADS:
        return 0
    heads = max(launch.seen.get("BLOCK_H", 0), launch.seen["BLOCK_K"])
    return heads * launch.seen.get("BLOCK_HALF", launch.seen.get("BLOCK_E")) // (32 * launch.num_warps)
