"""The paged KV cache of one rank: its tensors, and how many blocks of them fit.

Knows nothing of who owns which block; that is `rayllm.scheduler.block_manager`.
"""

from dataclasses import dataclass

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
    def block_bytes(self) -> int:
        per_token = 2 * len(self.layers) * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.block_size


def cache_dtype(model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The model's dtype, but for float16 on CPU: the compiled attention there reads float32 and bfloat16 pages only."""
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


class KVCache:
    """Keys and values `[num_blocks, block_size, num_kv_heads, head_dim]` for each of the rank's layers."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        shape = (num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)
        self._first_layer = layout.layers.start
        self._pages = [
            (
                torch.zeros(shape, dtype=layout.dtype, device=layout.device),
                torch.zeros(shape, dtype=layout.dtype, device=layout.device),
            )
            for _ in layout.layers
        ]

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """`(k_NPKE, v_NPKE)` of a layer by its global number."""
        return self._pages[layer - self._first_layer]
