"""The user's model cache: directories that are complete or not there at all.

Knows nothing of what the directories hold.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rayllm.core.errors import ConfigError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def models_cache() -> Path:
    """Where converted models lie (XDG base directory specification); may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rayllm" / "models"


@contextmanager
def publish(destination: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields an empty directory to fill; without an error it then becomes `destination` in one step.

    `shared`: whoever fills it fills it with the same; of two processes that do so at once the first one wins, and the
    other's copy is thrown away. Otherwise a destination that has come meanwhile is left alone, and is an error.

    With an error nothing is left, nor are the directories above it that were not there. Raises ConfigError where there
    can be no such directory, before anything is filled, and where there is no room for it.
    """
    missing = [parent for parent in destination.parents if not os.path.lexists(parent)]  # the nearest first
    staging = destination.parent / f".{destination.name}-{secrets.token_hex(8)}"
    try:  # around the making too: a signal may come as soon as it is there
        _make(staging, missing, destination)
        yield staging
        for path in staging.iterdir():
            _flush(path)  # or the rename may survive a power cut that the contents do not
            path.chmod(0o644)  # safetensors and mkdtemp make what they write private
        staging.chmod(0o755)
        try:
            staging.rename(destination)
        except OSError as error:
            if not destination.is_dir():
                raise
            if not shared:
                raise ConfigError(f"{destination} has come meanwhile; name another directory") from error
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise ConfigError(f"{destination}: cannot be written: {os.strerror(error.errno)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(missing)


def _make(staging: Path, missing: Sequence[Path], destination: Path) -> None:
    try:
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
        staging.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"{destination}: cannot be made: {error.strerror}") from error


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in directories:
        with suppress(OSError):  # it holds something, or was never made
            directory.rmdir()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
