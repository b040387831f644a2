"""The key that it takes to change an endpoint's weights: what can be asked of it decides what every client is told.

`RAYLLM_ADMIN_KEY` where it is set. Else an endpoint on this machine makes up one, and leaves it where only the same
user can read it; without either, nobody may. Light: the command line imports it.
"""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayllm.models.cache import models_cache

logger = logging.getLogger(__name__)

VARIABLE = "RAYLLM_ADMIN_KEY"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def find_key(host: str, port: int) -> str | None:
    """For calls to an endpoint."""
    if (key := os.environ.get(VARIABLE)) is not None:
        return key
    if host not in LOCAL_HOSTS:
        return None
    try:
        return _path(port).read_text()
    except OSError:
        return None


@contextmanager
def local_key(port: int) -> Iterator[str]:
    """Of an endpoint that listens there, to be found for as long as this is entered."""
    if (given := os.environ.get(VARIABLE)) is not None:
        yield given
        return
    key, path = secrets.token_urlsafe(32), _path(port)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a killed endpoint's
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key)
    except OSError as error:
        logger.warning("%s cannot be written (%s): only %s lets anyone change the weights", path, error, VARIABLE)
    try:
        yield key
    finally:
        path.unlink(missing_ok=True)


def _path(port: int) -> Path:
    return models_cache().parent / "endpoints" / f"{port}.key"
