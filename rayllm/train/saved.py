"""Checkpoints on disk: one folder each, whole or not there.

RUN/checkpoints/step-00000100/
    config.json, model.safetensors, tokenizer.json, ...    a Hugging Face directory
    adapter/                                               of a run with LoRA: what it learnt, as peft writes it
    training/                                              float32 weights, moments, RNG, as torch.distributed's DCP
    state.json                                             step, loss, data cursor
    manifest.json                                          size and sha256 of every other file

A folder is filled under a name that begins with a dot, and renamed when all of it is on the disk. Knows no tensors. The
metadata of torch.distributed.checkpoint are a pickle: go on only from a run that you trust.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from rayllm.core.errors import CheckpointError
from rayllm.models.manifest import FileEntry, Manifest
from rayllm.train.config import CheckpointConfig

TRAINING = "training"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """What there is to know of a run after `step` steps, besides tensors. `loss` and, where answers have one, `reward`:
    means over the steps since the checkpoint before; `cursor`: the data's."""

    step: int
    loss: float
    reward: float | None = None
    cursor: Mapping[str, Any]

    @property
    def best_first(self) -> tuple[float, int]:
        """To sort by: by reward where there is one, for the loss of a policy gradient says nothing."""
        return (self.loss if self.reward is None else -self.reward, -self.step)


@dataclass(frozen=True, slots=True)
class Saved:
    directory: Path

    @property
    def state(self) -> TrainState:
        try:
            return msgspec.json.decode((self.directory / _STATE).read_bytes(), type=TrainState)
        except (OSError, msgspec.MsgspecError) as error:
            raise CheckpointError(self.directory / _STATE, f"is not the state of a run: {error}") from None

    def verify(self) -> None:
        """Reads every file. Raises CheckpointError that names the first one that is not what was written."""
        for name, entry in Manifest.read(self.directory).files.items():
            path = self.directory / name
            if not path.is_file():
                raise CheckpointError(path, "is missing; remove its folder to go on from the checkpoint before")
            if FileEntry.of(path) != entry:
                raise CheckpointError(
                    path, "is not what was written; remove its folder to go on from the checkpoint before"
                )


class SavedRun:
    """The checkpoints of one run. One process alone changes them."""

    def __init__(self, run: Path) -> None:
        self.directory = run / "checkpoints"

    def all(self) -> list[Saved]:
        """Oldest first."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        return [Saved(path) for path in sorted(found, key=lambda path: int(path.name.removeprefix("step-")))]

    def latest(self) -> Saved | None:
        saved = self.all()
        return saved[-1] if saved else None

    def staging(self, step: int) -> Path:
        """Where the checkpoint of `step` is put together."""
        return self.directory / f".{_name(step)}.partial"

    def begin(self, step: int) -> None:
        """Makes an empty `staging`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.remove_leftovers()
        (self.staging(step) / TRAINING).mkdir(parents=True)

    def remove_leftovers(self) -> None:
        """Of a save that was killed. For whoever is alone in the run's folder."""
        for path in self.directory.glob(".step-*"):
            shutil.rmtree(path)

    def publish(self, state: TrainState) -> Saved:
        """Seals what lies in `staging`, flushes it to the disk, and gives it its name in one step."""
        staging, final = self.staging(state.step), self.directory / _name(state.step)
        (staging / _STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        Manifest({str(path.relative_to(staging)): FileEntry.of(path) for path in _files(staging)}).write(staging)
        for path in [*_files(staging), *_folders(staging), staging]:
            _flush(path)
        if final.exists():  # the run went back to an older one and came here again
            _remove(final)
        staging.rename(final)
        _flush(self.directory)
        return Saved(final)

    def prune(self, config: CheckpointConfig) -> None:
        saved = self.all()
        ranked = sorted(saved, key=lambda one: one.state.best_first) if config.keep_best else []
        kept = {*saved[-config.keep_last :], *ranked[: config.keep_best]}
        for one in saved:
            if one not in kept:
                _remove(one.directory)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _folders(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_dir())


def _remove(directory: Path) -> None:
    """Never half there under its name."""
    hidden = directory.with_name(f".{directory.name}.removed")
    directory.rename(hidden)
    shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
