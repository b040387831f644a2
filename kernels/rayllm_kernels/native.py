"""Compile a loop with numba and run it on torch's own OpenMP threads.

numba's `prange` would bring a second pool of threads beside torch's; on few cores the idle pool's spinning then steals
the core that the other one needs, and numba's default pool may not be entered from two Python threads. So kernels are
compiled as plain C functions and started with `GOMP_parallel` of the OpenMP library that torch itself runs on: one
pool, sized by `torch.get_num_threads()`, safe from any number of Python threads.

A kernel is a function of one address, the argument block: int64 ticket counter, int64 number of tasks, then int64
arguments, then float64 ones. It draws tasks with `next_task` until none is left, so it is right under any number of
threads and uneven cores do not matter. What a task computes never depends on the number of threads.
"""

import contextlib
import ctypes
import hashlib
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numba
import torch
from torch import Tensor

from rayllm_kernels.simd import fetch_increment, inlined, load_f64, load_i64

logger = logging.getLogger(__name__)

_HEADER = 2  # ticket, tasks
# numba keys its cache by the file that holds a kernel; what goes into it from other files is named here by its content.
_HELPERS = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:12]
_REGISTRY: list["Kernel"] = []


@inlined
def next_task(block: int) -> int:
    """The next task's number, or -1 when all are taken."""
    task = fetch_increment(block)
    return task if task < load_i64(block + 8) else -1


@inlined
def integer(block: int, index: int) -> int:
    return load_i64(block + 8 * (2 + index))  # type: ignore[no-any-return]


@inlined
def real(block: int, index: int) -> float:
    """A float64 argument; `index` counts on from the integers."""
    return load_f64(block + 8 * (2 + index))  # type: ignore[no-any-return]


def _load_parallel() -> Callable[[int, object, int, int], None] | None:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP library in torch, None where there is none."""
    candidates = [*sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")), "libgomp.so.1"]
    for name in candidates:
        try:
            # RTLD_NOLOAD: only a library that torch has loaded already; another copy would be another pool.
            library = ctypes.CDLL(str(name), mode=ctypes.RTLD_LOCAL | 4)
        except OSError:
            continue
        function = library.GOMP_parallel
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    logger.warning("no libgomp in this torch build: compiled CPU kernels run on one thread")
    return None


_parallel = _load_parallel()
PARALLEL_ADDRESS = 0 if _parallel is None else ctypes.cast(cast(Any, _parallel), ctypes.c_void_p).value or 0


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel that was started, with a copy of its argument block."""

    function: int
    block: ctypes.Array[ctypes.c_char]
    threads: int


class _Recording(threading.local):
    launches: list[Launch] | None = None
    allocate: Callable[[Sequence[int], torch.dtype], Tensor] | None = None


_recording = _Recording()


@contextlib.contextmanager
def recording(allocate: Callable[[Sequence[int], torch.dtype], Tensor]) -> Iterator[list[Launch]]:
    """Within, this thread's kernels run as ever and are noted; their outputs come from `allocate`."""
    assert _recording.launches is None, "a recording within a recording"
    _recording.launches, _recording.allocate = [], allocate
    try:
        yield _recording.launches
    finally:
        _recording.launches = _recording.allocate = None


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An output in the dtype and on the device of `like`: all that kernels return is allocated here."""
    if _recording.allocate is not None:
        return _recording.allocate(shape, like.dtype)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


class Kernel:
    """A compiled kernel; compiled (or read from numba's cache) at the first call or by `compile`."""

    def __init__(
        self,
        body: Callable[[int], None],
        *,
        integers: int,
        reals: int = 0,
        parallel_from: int = 2,
        runs_here: Callable[[], bool] = lambda: True,
    ) -> None:
        """`parallel_from`: fewer tasks than this stay on the calling thread, being less work than starting others.

        `runs_here`: false where the processor lacks the kernel's instructions; compiling would abort the process.
        """
        body.__qualname__ = f"{body.__name__}_{_HELPERS}"
        self._body = body
        self._parallel_from = parallel_from
        self.runs_here = runs_here
        self._layout = struct.Struct(f"={_HEADER + integers}q{reals}d")
        self._block = ctypes.c_char * self._layout.size
        self._lock = threading.Lock()
        self._address = 0
        self._direct: Callable[[object], None] | None = None
        _REGISTRY.append(self)

    def compile(self) -> None:
        with self._lock:
            if self._address:
                return
            decorate = {"error_model": "numpy", "nopython": True}
            try:
                function = numba.cfunc("void(int64)", cache=True, **decorate)(self._body)
            except RuntimeError as error:  # numba found no directory that it may write to
                logger.warning("compiling %s anew in each process: %s", self._body.__name__, error)
                function = numba.cfunc("void(int64)", **decorate)(self._body)
            self._direct = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)
            self._function = function  # owns the code
            self._address = function.address

    def __call__(self, tasks: int, *arguments: float) -> None:
        """Run tasks 0 to `tasks` - 1 with the kernel's integers, then its reals."""
        if not self._address:
            self.compile()
        block = self._block.from_buffer_copy(self._layout.pack(0, tasks, *arguments))
        threads = 1 if tasks < self._parallel_from else min(tasks, torch.get_num_threads())
        if _recording.launches is not None:
            _recording.launches.append(Launch(self._address, self._block.from_buffer_copy(block), threads))
        if threads > 1 and _parallel is not None:
            _parallel(self._address, block, threads, 0)
        elif self._direct is not None:
            self._direct(block)


def compile_kernels() -> float:
    """Compile every kernel, or read it from numba's cache, so that no request waits for it -> seconds."""
    begin = time.perf_counter()
    for kernel in _REGISTRY:
        if kernel.runs_here():
            kernel.compile()
    return time.perf_counter() - begin
