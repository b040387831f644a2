"""Record the kernels that a function starts, and start them again without the function: a CUDA graph's idea, on CPU.

A decode step of a small model is hundreds of kernels of some ten microseconds. Between two of them Python prepares the
next with cold caches, because the kernels stream weights through them; that is a quarter of the step. A graph starts
them one after another from compiled code.

As with a CUDA graph the addresses are fixed: a caller writes new values into the same input tensors and reads the
same output. A function can be recorded when all its work is done by kernels of this package; `capture` checks that.
"""

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rayllm_kernels.native import PARALLEL_ADDRESS, Kernel, Launch, integer, recording
from rayllm_kernels.simd import load_i64, operation, pointer, store_i64

_ALIGNMENT = 64
_Bytes = npt.NDArray[np.uint8]


class NotCapturableError(Exception):
    """The function does something that a replay would leave out; the message names it."""


class Workspace:
    """Memory for what captured functions compute on the way, shared by graphs that never run at the same time.

    Within a capture a buffer is used again as soon as the last tensor on it is gone, as at any other time.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[_Bytes]] = defaultdict(list)
        self.nbytes = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = max(1, math.prod(shape)) * dtype.itemsize
        rounded = 1 << (size - 1).bit_length()
        buffer = self._free[rounded].pop() if self._free[rounded] else self._new(rounded)
        lent = buffer[:size]
        weakref.finalize(lent, self._free[rounded].append, buffer)
        return torch.from_numpy(lent).view(dtype).view(tuple(shape))

    def _new(self, size: int) -> _Bytes:
        self.nbytes += size
        padded = np.empty(size + _ALIGNMENT, np.uint8)
        start = -padded.ctypes.data % _ALIGNMENT
        return padded[start : start + size]


class Graph:
    """What `capture` recorded. `output` holds the latest replay's result, until another graph of its workspace runs."""

    def __init__(self, output: Tensor, launches: list[Launch], workspace: Workspace) -> None:
        self.output = output
        self._workspace = workspace  # the kernels' addresses lie in it
        self._blocks = [launch.block for launch in launches]  # the table has their addresses
        rows = [(launch.function, ctypes.addressof(launch.block), launch.threads) for launch in launches]
        self._table = np.array(rows, np.int64)

    def __len__(self) -> int:
        """The number of kernels that a replay starts."""
        return len(self._blocks)

    def replay(self) -> Tensor:
        _start_launches_kernel(1, PARALLEL_ADDRESS, self._table.ctypes.data, len(self))
        return self.output


def capture(function: Callable[[], Tensor], workspace: Workspace) -> Graph:
    """Run `function` once and record it. Its result is in the graph's `output`.

    Raises NotCapturableError when it ran an operation of torch that computes: the result of that is right, but a
    replay would not repeat it.
    """
    watch = _ComputeWatch()
    with recording(workspace.empty) as launches, watch:
        output = function()
    if watch.found is not None:
        raise NotCapturableError(f"{watch.found} is no kernel that can be recorded")
    return Graph(output, launches, workspace)


class _ComputeWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation that is more than another view of memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and self.found is None:
            self.found = str(func)
        return func(*args, **(kwargs or {}))


@operation(types.void, types.int64, types.int64)
def _call(builder: Any, function: Any, block: Any) -> Any:
    signature = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
    return builder.call(pointer(builder, function, signature), [block])


@operation(types.void, types.int64, types.int64, types.int64, types.int64)
def _call_parallel(builder: Any, parallel: Any, function: Any, block: Any, threads: Any) -> Any:
    int32, int64 = ir.IntType(32), ir.IntType(64)
    signature = ir.FunctionType(ir.VoidType(), [int64, int64, int32, int32])
    count = builder.trunc(threads, int32)
    return builder.call(pointer(builder, parallel, signature), [function, block, count, int32(0)])


def _start_launches(block: int) -> None:
    """Kernel of one task. `table`: of each launch its function, argument block and number of threads, int64 each."""
    parallel, table, count = integer(block, 0), integer(block, 1), integer(block, 2)
    for launch in range(table, table + 24 * count, 24):
        function, arguments, threads = load_i64(launch), load_i64(launch + 8), load_i64(launch + 16)
        store_i64(arguments, 0)  # the ticket counter
        if threads > 1 and parallel != 0:
            _call_parallel(parallel, function, arguments, threads)
        else:
            _call(function, arguments)


_start_launches_kernel = Kernel(_start_launches, integers=3)
