"""int8 products against torch: on a GPU by `--device cuda`, else on CPU.

CPU: microseconds of bfloat16 by torch and by us, torch._int_mm alone, W8A8 and W8A16. Weights are walked through, so
that they come from memory as in a model.

GPU: every tile configuration for each M, W8A8 plain and with 16 outlier columns, W8A16; TOP/s and the ratio to cuBLAS
in bfloat16, measured in the same process. Inputs rotate and the second-level cache is flushed.

    OMP_NUM_THREADS=2 python kernels/bench/int8_linear.py --rows 1 16 64 512
    python kernels/bench/int8_linear.py --device cuda --shapes 4096x4096 --csv results.csv
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from rayllm_kernels import compile_kernels, linear, quantize_rows, w8a8_linear, w8a16_linear

_CPU_SHAPES = ["4096x1024", "960x576", "576x576", "3072x576", "576x1536", "49152x576"]
_CPU_BYTES = 1 << 27  # of weights to walk through
_FLUSH_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    name: str
    outputs: int
    length: int
    rows: int
    us: float
    ratio: float  # to bfloat16 by torch


def median_cpu(call: Callable[[int], object], count: int, repeats: int) -> float:
    """Median microseconds of a call over `repeats` walks through `count` weights."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for i in range(count):
            call(i)
        times.append((time.perf_counter() - begin) / count)
    return statistics.median(times) * 1e6


def median_cuda(call: Callable[[int], object], count: int, repeats: int) -> float:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for i in range(-3, repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(i % count)
        end.record()
        torch.cuda.synchronize()
        if i >= 0:
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def calls(
    outputs: int, length: int, rows: int, count: int, device: str
) -> Iterator[tuple[str, Callable[[int], object]]]:
    """bfloat16 by torch first."""
    int8 = [torch.randint(-127, 128, (outputs, length), dtype=torch.int8, device=device) for _ in range(count)]
    bf16 = [weight.to(torch.bfloat16) for weight in int8]
    scale = torch.rand(outputs, 1, device=device) / 100
    x = torch.randn(rows, length, device=device).bfloat16()
    columns = torch.randperm(length, device=device)[:16].int().sort().values
    outliers = torch.randn(16, outputs, device=device).bfloat16().t()
    yield "bf16 torch", lambda i: F.linear(x, bf16[i])
    if device == "cpu":
        q, _ = quantize_rows(x)
        yield "bf16 ours", lambda i: linear(x, bf16[i])
        yield "_int_mm alone", lambda i: torch._int_mm(q, int8[i].t())
    yield "w8a8", lambda i: w8a8_linear(x, int8[i], scale)
    yield (
        "w8a8, 16 outliers",
        lambda i: w8a8_linear(x, int8[i], scale, outlier_columns_J=columns, outlier_weight_NJ=outliers),
    )
    yield "w8a16", lambda i: w8a16_linear(x, int8[i], scale)
    if device == "cuda":
        yield from _configurations(x, int8, scale)


def _configurations(
    x: torch.Tensor, int8: list[torch.Tensor], scale: torch.Tensor
) -> Iterator[tuple[str, Callable[[int], object]]]:
    from rayllm_kernels.gpu import int8_linear as gpu

    q, x_scale, kept = gpu.quantize_rows(x, None)
    yield "quantize rows alone", lambda i: gpu.quantize_rows(x, None)
    for tiles in next(choices for most, choices in gpu.W8A8.items() if len(x) <= most):
        yield (
            f"w8a8 alone {tiles}",
            lambda i, tiles=tiles: gpu.launch_w8a8(q, x_scale, int8[i], scale, None, kept, None, tiles),
        )
    for tiles in next(choices for most, choices in gpu.W8A16.items() if len(x) <= most):
        for splits in (1, 2, 4, 8):
            yield (
                f"w8a16 {tiles} splits {splits}",
                lambda i, tiles=tiles, splits=splits: gpu.launch_w8a16(x, int8[i], scale, None, tiles, splits),
            )


def measure(shape: str, rows: int, device: str, repeats: int) -> Iterator[Result]:
    outputs, length = map(int, shape.split("x"))
    count = max(2, min(60, _CPU_BYTES // (outputs * length))) if device == "cpu" else 4
    median = median_cpu if device == "cpu" else median_cuda
    baseline = 0.0
    for name, call in calls(outputs, length, rows, count, device):
        us = median(call, count, repeats)
        baseline = baseline or us
        yield Result(name=name, outputs=outputs, length=length, rows=rows, us=us, ratio=baseline / us)


def _machine(device: str) -> list[str]:
    if device == "cpu":
        return [f"CPU, {torch.get_num_threads()} threads", "", torch.__version__, ""]
    import triton

    return [torch.cuda.get_device_name(), str(torch.cuda.clock_rate()), torch.__version__, triton.__version__]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+", help="outputs x length, such as 4096x1024")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    if not cuda:
        compile_kernels()
    rows = given.rows or ([1, 16, 64, 256, 1024, 4096] if cuda else [1, 16, 64, 512])
    shapes = given.shapes or (["4096x4096", "6144x4096", "4096x14336"] if cuda else _CPU_SHAPES)
    machine = _machine(given.device)
    print(*machine)
    with torch.inference_mode():
        for shape in shapes:
            for m in rows:
                results = list(measure(shape, m, given.device, given.repeats or (50 if cuda else 7)))
                for one in results:
                    tops = 2e-6 * one.rows * one.outputs * one.length / one.us
                    print(f"{shape:>12} M {m:5} {one.name:60} {one.us:9.1f} us {tops:8.2f} TOP/s {one.ratio:6.2f} x")
                sys.stdout.flush()
                if given.csv is not None:
                    _append(given.csv, machine, results)


def _append(path: Path, machine: list[str], results: list[Result]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            header = [
                "card",
                "clock_mhz",
                "torch",
                "triton",
                "kernel",
                "outputs",
                "length",
                "rows",
                "median_us",
                "ratio",
            ]
            writer.writerow(header)
        for one in results:
            shape = [one.outputs, one.length, one.rows]
            writer.writerow([*machine, one.name, *shape, f"{one.us:.2f}", f"{one.ratio:.3f}"])


if __name__ == "__main__":
    main()
