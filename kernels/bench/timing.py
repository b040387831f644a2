"""How the benchmarks measure and what they write: a row for each figure, with the machine that gave it.

A benchmark is a function `figures(timer, quick)` that yields a `Figure` for each kernel and case; `main` gives it a
command line. `quick`: the cases that a first look needs. Both sides of a ratio are measured in the same process.

On a GPU a call is replayed from a CUDA graph, so that Python's part is left out, and timed by events; before each one
the second-level cache is overwritten. On CPU the sets of inputs are walked through, and are to be so many
(`copies_from_memory`) that none is in a cache when its turn comes again. Figures are medians.
"""

import argparse
import csv
import importlib.metadata
import itertools
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_FLUSH_BYTES = 1 << 28  # of a GPU: more than the second-level cache of any
_CPU_BYTES = 1 << 27  # walked through on CPU
_WARM_UP = 3
_CLOCKS_LAST = 5.0  # seconds

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """`kernel`: which implementation, or with which tiles; `us`: median microseconds of a call.

    `moved`: bytes that have to be read and written at least; `flops`: operations that the case asks for, not those that
    an implementation takes. `baseline`: what `baseline_us` is of.
    """

    op: str
    case: str
    kernel: str
    us: float
    moved: float | None = None
    flops: float | None = None
    baseline: str | None = None
    baseline_us: float | None = None

    def row(self) -> dict[str, object]:
        return {
            "op": self.op,
            "case": self.case,
            "kernel": self.kernel,
            "median_us": f"{self.us:.2f}",
            "gb_per_s": "" if self.moved is None else f"{self.moved / self.us * 1e-3:.1f}",
            "tflop_per_s": "" if self.flops is None else f"{self.flops / self.us * 1e-6:.3f}",
            "baseline": self.baseline or "",
            "baseline_us": "" if self.baseline_us is None else f"{self.baseline_us:.2f}",
            "ratio": "" if self.baseline_us is None else f"{self.baseline_us / self.us:.4g}",
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Timer:
    device: str  # "cpu" or "cuda"
    repeats: int

    def median_us(self, calls: Sequence[Call], *, graph: bool = True) -> float:
        """Of one of `calls`, which do the same with other inputs and take turns.

        `graph` False: for what a CUDA graph cannot hold; then Python's part is in the figure where it is longer.
        """
        if self.device == "cpu":
            return self._median_of_walks(calls)
        if graph:
            calls = [_captured(call).replay for call in calls]
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        events = []
        for call in itertools.islice(itertools.cycle(calls), _WARM_UP + self.repeats):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events[_WARM_UP:]) * 1e3

    def _median_of_walks(self, calls: Sequence[Call]) -> float:
        times = []
        for _ in range(1 + self.repeats):
            begin = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - begin) / len(calls))
        return statistics.median(times[1:]) * 1e6

    def copies_from_memory(self, size: int) -> int:
        """How many sets of inputs of `size` bytes take turns."""
        return 3 if self.device == "cuda" else max(2, min(60, _CPU_BYTES // size))


def _captured(call: Call) -> torch.cuda.CUDAGraph:
    for _ in range(2):  # compiles, and allocates what libraries keep
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


class Machine:
    """What a figure was measured with, as columns of its row."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._clocks, self._read_at = "", -_CLOCKS_LAST
        triton = importlib.metadata.version("triton") if device == "cuda" else ""
        self._fixed = {"card": _card(device), "driver": _query_gpu("driver_version") if device == "cuda" else ""}
        self._versions = {"torch": str(torch.__version__), "triton": triton, "python": platform.python_version()}

    def columns(self) -> dict[str, str]:
        """The clocks, in MHz, are at most 5 s old: those of the figure before, at rest they would be lower."""
        if time.monotonic() - self._read_at > _CLOCKS_LAST:
            self._clocks = _query_gpu("clocks.sm,clocks.mem") if self._device == "cuda" else _cpu_clock()
            self._read_at = time.monotonic()
        return self._fixed | {"clocks_mhz": self._clocks} | self._versions


def _card(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_info('model name') or platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_clock() -> str:
    return _cpu_info("cpu MHz").partition(".")[0]


def _cpu_info(name: str) -> str:
    """A value of the first processor, empty where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _query_gpu(what: str) -> str:
    """What nvidia-smi says of the current GPU, values by slashes, or "unknown" where it does not run."""
    card = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", f"--id={card}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.strip().replace(", ", "/")


def main(
    description: str, figures: Callable[[Timer, bool], Iterator[Figure]], *, devices: Sequence[str] = ("cpu", "cuda")
) -> None:
    """The command line that all benchmarks have; `devices`: those that there is something to measure on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=devices, default="cuda" if cuda and "cuda" in devices else devices[0])
    parser.add_argument("--repeats", type=int, help="calls a figure is the median of (30; 7 walks on CPU)")
    parser.add_argument("--quick", action="store_true", help="only the cases that a first look needs")
    parser.add_argument("--csv", type=Path, help="add the rows to this file")
    given = parser.parse_args()
    if given.device == "cuda" and not cuda:
        parser.error("this machine has no CUDA device that torch can use")
    timer = Timer(device=given.device, repeats=given.repeats or (30 if given.device == "cuda" else 7))
    machine = Machine(given.device)
    print(*(f"{name} {value}" for name, value in machine.columns().items() if value), sep=", ", flush=True)
    for figure in figures(timer, given.quick):
        row = figure.row()
        print("{op:18} {case:34} {kernel:30} {median_us:>11} us".format(**row), end="")
        print("{gb_per_s:>9} GB/s {tflop_per_s:>9} TFLOP/s {ratio:>7} x {baseline}".format(**row), flush=True)
        if given.csv is not None:
            try:
                append_row(given.csv, row | machine.columns())
            except OSError as error:
                parser.exit(1, f"error: {given.csv}: {error.strerror}\n")


def append_row(path: Path, row: dict[str, object]) -> None:
    """Whole rows only: what an interrupted benchmark has measured stays."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
