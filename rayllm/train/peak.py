"""How many floating point operations a second a rank's device could do at most: what a run's speed is a share of."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Dense bfloat16 on tensor cores, by NVIDIA's data sheets (those that state it with sparsity state twice as much).
PUBLISHED: Mapping[str, float] = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
_SIZES = (256, 512, 1024, 2048, 4096)
_ENOUGH_S = 0.1


@dataclass(frozen=True, slots=True)
class Peak:
    """`flops` a second of all ranks. `published`: by the data sheet of the cards; else what a matrix product reached
    here, on all ranks at once, in the dtype of the computation."""

    flops: float
    published: bool


def world_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Called by every rank of the world at once, so that ranks that share cores share them here too."""
    flops = None
    if device.type == "cuda" and dtype == torch.bfloat16:
        flops = published_peak(torch.cuda.get_device_name(device))
    measured = measured_peak(device, dtype) if flops is None else 0.0
    totals = torch.tensor([flops or measured, float(flops is None)], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return Peak(flops=float(totals[0]), published=float(totals[1]) == 0)


def published_peak(name: str) -> float | None:
    """Of a whole card, by its name; None for one that is not known, or only a part of a card."""
    if "MIG" in name:
        return None
    return next((flops for card, flops in PUBLISHED.items() if re.search(rf"\b{card}\b", name)), None)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of square matrix products that grow until one takes `_ENOUGH_S` in all."""
    best = 0.0
    for size in _SIZES:
        matrix = torch.linspace(-1, 1, size * size, device=device).to(dtype).view(size, size)
        taken = [_seconds(matrix) for _ in range(3)]
        best = max(best, 2 * size**3 / min(taken))
        if sum(taken) > _ENOUGH_S:
            break
    return best


def _seconds(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    product = matrix @ matrix
    if product.is_cuda:
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - started
