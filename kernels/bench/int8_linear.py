"""int8 products against torch in bfloat16.

CPU: bfloat16 by torch and by us, torch._int_mm alone, W8A8 and W8A16. Weights come from memory, as in a model.

GPU: every tile configuration for each M, W8A8 plain and with 16 outlier columns, W8A16; the ratio is to cuBLAS.

    OMP_NUM_THREADS=2 python kernels/bench/int8_linear.py
    python kernels/bench/int8_linear.py --device cuda --csv int8_linear.csv
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from timing import Figure, Timer, main
from torch.nn import functional as F

from rayllm_kernels import compile_kernels, linear, pack_weight, quantize_rows, w8a8_linear, w8a16_linear

if TYPE_CHECKING:
    from rayllm_kernels.gpu.int8_linear import Tiles

# Outputs, length.
_CPU_SHAPES = [(4096, 1024), (1024, 4096), (960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]
_CUDA_SHAPES = [(4096, 4096), (6144, 4096), (4096, 14336)]
_CPU_ROWS, _CUDA_ROWS = [1, 4, 16, 32, 64, 128, 256, 512], [1, 16, 64, 256, 1024, 4096]


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
    packed = [pack_weight(weight, x.dtype) for weight in int8]
    yield "w8a8", lambda i: w8a8_linear(x, packed[i], scale)
    yield (
        "w8a8, 16 outliers",
        lambda i: w8a8_linear(x, packed[i], scale, outlier_columns_J=columns, outlier_weight_NJ=outliers),
    )
    yield "w8a16", lambda i: w8a16_linear(x, int8[i], scale)
    if device == "cuda":
        yield from _configurations(x, int8, scale)


def _configurations(
    x: torch.Tensor, int8: list[torch.Tensor], scale: torch.Tensor
) -> Iterator[tuple[str, Callable[[int], object]]]:
    from rayllm_kernels.gpu import int8_linear as gpu

    q, x_scale, kept = gpu.quantize_rows(x, None, None)
    yield "quantize rows alone", lambda i: gpu.quantize_rows(x, None, None)
    for tiles in next(choices for most, choices in gpu.W8A8.items() if len(x) <= most):
        yield (
            f"w8a8 alone {_name(tiles)}",
            lambda i, tiles=tiles: gpu.launch_w8a8(q, x_scale, int8[i], scale, None, kept, None, tiles),
        )
    for tiles in next(choices for most, choices in gpu.W8A16.items() if len(x) <= most):
        for splits in (1, 2, 4, 8):
            yield (
                f"w8a16 {_name(tiles)} splits {splits}",
                lambda i, tiles=tiles, splits=splits: gpu.launch_w8a16(x, int8[i], scale, None, tiles, splits),
            )


def _name(tiles: "Tiles") -> str:
    return f"{tiles.t}x{tiles.n}x{tiles.k} w{tiles.num_warps} s{tiles.num_stages}"


def measure(timer: Timer, outputs: int, length: int, rows: int) -> Iterator[Figure]:
    count = timer.copies_from_memory(outputs * length)
    theirs_us = None
    for name, call in calls(outputs, length, rows, count, timer.device):
        us = timer.median_us([lambda i=i, call=call: call(i) for i in range(count)])
        yield Figure(
            op="int8_linear",
            case=f"M{rows} N{outputs} K{length}",
            kernel=name,
            us=us,
            flops=2 * rows * outputs * length,
            moved=(2 if name.startswith("bf16") else 1) * outputs * length + 2 * rows * (outputs + length),
            baseline=None if theirs_us is None else "bf16 torch",
            baseline_us=theirs_us,
        )
        theirs_us = theirs_us or us


def figures(timer: Timer, quick: bool) -> Iterator[Figure]:
    cuda = timer.device == "cuda"
    if not cuda:
        compile_kernels()
    shapes = _CUDA_SHAPES if cuda else _CPU_SHAPES
    with torch.inference_mode():
        for outputs, length in shapes[:1] if quick else shapes:
            for rows in _CUDA_ROWS if cuda else _CPU_ROWS:
                yield from measure(timer, outputs, length, rows)


if __name__ == "__main__":
    main(__doc__, figures)
