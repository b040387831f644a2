"""The manifest beside a checkpoint's files: size and sha256 of each. Training writes it; whoever reads the files may
compare."""

import hashlib
import json
from pathlib import Path

import msgspec

from rayllm.core.errors import CheckpointError

MANIFEST = "manifest.json"


class FileEntry(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileEntry":
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


class Manifest(msgspec.Struct, frozen=True):
    """`files`: every file but the manifest itself, by its path below the directory."""

    files: dict[str, FileEntry]

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Raises CheckpointError."""
        path = directory / MANIFEST
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise CheckpointError(path, f"cannot be read: {error}") from None

    def write(self, directory: Path) -> None:
        text = json.dumps(msgspec.to_builtins(self), indent=1)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def check_manifest(directory: Path) -> None:
    """Reads the model's files, not those of directories inside. Raises CheckpointError for the first that is missing,
    cannot be read or is not what was written. A directory without a manifest passes."""
    if not (directory / MANIFEST).exists():
        return
    for name, entry in Manifest.read(directory).files.items():
        path = directory / name
        if path.parent != directory:
            continue
        if not path.is_file():
            raise CheckpointError(path, f"is missing, though {MANIFEST} names it")
        try:
            found = FileEntry.of(path)
        except OSError as error:
            raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
        if found != entry:
            raise CheckpointError(path, f"is damaged: it is not what {MANIFEST} says was written")
