"""The paged KV cache of one rank: its tensors, and how many blocks of them fit.

Knows nothing of who owns which block; that is `rayllm.scheduler.block_manager`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rayllm.core.config import CacheConfig
from rayllm.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """What one rank stores for each token: its own layers and its own KV heads."""

    layers: range  # global layer numbers
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def has_scales(self) -> bool:
        return self.dtype == torch.int8

    @property
    def block_bytes(self) -> int:
        per_head = self.head_dim * self.dtype.itemsize + (torch.float32.itemsize if self.has_scales else 0)
        return 2 * len(self.layers) * self.num_kv_heads * per_head * self.block_size


def cache_dtype(name: str, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """For "auto" the model's dtype, but for float16 on CPU: the compiled attention there does not read it."""
    if name == "int8":
        return torch.int8
    return torch.float32 if device.type == "cpu" and model_dtype == torch.float16 else model_dtype


def num_blocks_that_fit(layout: KVLayout, config: CacheConfig) -> int:
    """Blocks for this rank. On CUDA call it after the weights are loaded, since what they leave is shared out.

    Raises ConfigError when not even one block fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    if layout.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(layout.device)
        budget = int(free - total * (1.0 - config.gpu_memory_fraction))
        what = f"gpu_memory_fraction={config.gpu_memory_fraction} of {total / 1e9:.1f} GB, weights subtracted,"
    else:
        budget = config.cpu_memory_bytes
        what = f"cpu_memory_bytes={budget}"
    num_blocks = budget // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(f"KV cache: {what} leaves no room for one block of {layout.block_bytes} bytes")
    return num_blocks


class Pages(NamedTuple):
    """A layer's keys and values; the scales are there when those are int8."""

    k_NPKE: Tensor
    v_NPKE: Tensor
    k_scales_NPK: Tensor | None
    v_scales_NPK: Tensor | None


class KVCache:
    """The pages of each of the rank's layers."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        shape = (num_blocks, layout.block_size, layout.num_kv_heads)

        def values() -> Tensor:
            return torch.zeros((*shape, layout.head_dim), dtype=layout.dtype, device=layout.device)

        def scales() -> Tensor | None:
            return torch.zeros(shape, dtype=torch.float32, device=layout.device) if layout.has_scales else None

        self._first_layer = layout.layers.start
        self._pages = [Pages(values(), values(), scales(), scales()) for _ in layout.layers]

    def pages(self, layer: int) -> Pages:
        """`layer` counts over the whole model."""
        return self._pages[layer - self._first_layer]
