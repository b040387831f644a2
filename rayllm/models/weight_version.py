"""A short name for a checkpoint's content, so that an answer can say which weights gave it."""

import hashlib
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def weight_version(directory: Path) -> str:
    """Of the configuration whole, and of each weight file its size and 64 pieces spread over it.

    Reading the whole would take as long as loading it; training that changes a tensor changes all of it, and so
    cannot miss every piece in practice. It names content, it does not prove it.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"w-{digest.hexdigest()[:16]}"
