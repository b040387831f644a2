"""Checkpoints made of another one: with other weights, or with something wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllm.models.checkpoint import WEIGHTS
from rayllm.models.manifest import FileEntry, Manifest

Tensors = dict[str, Tensor]


def changed(model: Path, directory: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy whose tensors `change` has changed."""
    shutil.copytree(model, directory)
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def retrained(model: Path, directory: Path, seed: int) -> Path:
    """Other weights of the same model, far enough away for other answers."""
    generator = torch.Generator().manual_seed(seed)

    def train(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3 * float(tensor.std() + 0.01))

    return changed(model, directory, train)


def configured(model: Path, directory: Path, **config: object) -> Path:
    """A copy with other values in config.json."""
    shutil.copytree(model, directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def sealed(directory: Path) -> Path:
    """With a manifest, as training leaves one."""
    Manifest({path.name: FileEntry.of(path) for path in directory.iterdir()}).write(directory)
    return directory


def flip_a_bit(directory: Path) -> Path:
    """Of the weights' last byte: still a well-formed file, of finite numbers."""
    path = directory / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the lowest byte of a float32
    path.write_bytes(content)
    return directory
