"""Tensors to safetensors files of bounded size, with the index that Hugging Face directories have."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rayllm.models.checkpoint import INDEX, WEIGHTS
from rayllm.models.quantization import OUTLIERS

MAX_SHARD_BYTES = 2 << 30
_METADATA = {"format": "pt"}


def pack(weight_NK: Tensor) -> Tensor:
    """int8 [N, K] -> int32 [N, K / 4], each value plus 128, the first in the lowest byte; rows padded with zeros."""
    padding = -weight_NK.shape[1] % 4
    padded = torch.nn.functional.pad(weight_NK, (0, padding)).contiguous()
    packed = padded.view(torch.uint8) ^ 0x80
    if padding:
        packed[:, -padding:] = 0
    return packed.view(torch.int32)


class ShardWriter:
    """Collects tensors and writes them, a shard at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._outliers: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > MAX_SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._shard_bytes += size
        self._total_bytes += size

    def add_outlier(self, name: str, tensor: Tensor) -> None:
        """For the file of its own, which other readers do not look for."""
        self._outliers[name] = tensor.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._flush()
        if self._outliers:
            _save(self._outliers, self._directory / OUTLIERS)
        if len(self._shards) == 1 and not self._outliers:
            (self._directory / _part(0)).rename(self._directory / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self._directory / _part(number)).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        # Also for one shard beside an outliers file: the index tells readers which files are the model's.
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        _save(self._shard, self._directory / _part(len(self._shards)))
        self._shards.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises OSError as other writing does, where safetensors has an error of its own."""
    try:
        save_file(dict(tensors), path, metadata=_METADATA)
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _part(number: int) -> str:
    return f"part-{number}.safetensors"
