"""The user's model cache: directories that are complete or not there at all.

Knows nothing of what the directories hold.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def models_cache() -> Path:
    """Where converted models lie (XDG base directory specification); may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rayllm" / "models"


@contextmanager
def publish(destination: Path) -> Iterator[Path]:
    """Yields an empty directory to fill; without an error it then becomes `destination` in one step.

    Two processes may fill the same destination at once: the first one wins, the other's copy is thrown away.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield staging
        for path in staging.iterdir():
            _flush(path)  # or the rename may survive a power cut that the contents do not
            path.chmod(0o644)  # safetensors and mkdtemp make what they write private
        staging.chmod(0o755)
        try:
            staging.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
