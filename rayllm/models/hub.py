"""From what a user calls a model to a Hugging Face directory on this machine."""

import difflib
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from rayllm.core.errors import CheckpointError
from rayllm.models.cache import models_cache, publish
from rayllm.models.embedded import EMBEDDED, Progress, fetch_embedded

# Everything that is read of a hub repository; never pickled weights, never code.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_HUB_IGNORED = ("original/*", "consolidated*", "*/*")
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
_GGUF_IDENTITY_BYTES = 1 << 20


def resolve_model(name_or_path: str, progress: Progress = lambda stage, fraction: None) -> Path:
    """The directory of an embedded model, a directory, a .gguf file (converted once into the cache) or a hub model.

    Fetches what is not on this machine yet. CheckpointError says what was looked for and why it was not found.
    """
    if not name_or_path:
        raise CheckpointError("model", "no name is given")
    if name_or_path in EMBEDDED:
        return fetch_embedded(name_or_path, progress)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _checked_directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(path, "is neither a Hugging Face directory nor a .gguf file")
        return _converted_gguf(path, progress)
    if _looks_like_path(name_or_path, path):
        raise CheckpointError(name_or_path, f"no such file or directory{_suggestion(path.name, _siblings(path))}")
    return _hub_snapshot(name_or_path, progress)


def _checked_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    if files := sorted(path.glob("*.gguf")):
        raise CheckpointError(path, f"holds no config.json; for a GGUF model name the file itself, {files[0].name}")
    raise CheckpointError(path / "config.json", "is missing, so this is not a Hugging Face model directory")


def _converted_gguf(path: Path, progress: Progress) -> Path:
    from rayllm.models.gguf_convert import CONVERTER_VERSION, convert  # torch and transformers, seconds to import

    directory = models_cache() / f"{path.stem}-{_gguf_identity(path, CONVERTER_VERSION)}"
    if not directory.is_dir():
        with publish(directory, shared=True) as staging:
            convert(path, staging, progress=lambda fraction: progress("convert", fraction))
    return directory


def _gguf_identity(path: Path, converter_version: int) -> str:
    """Changes when the file does, without reading all its gigabytes at each start."""
    status = path.stat()
    with path.open("rb") as file:
        start = file.read(_GGUF_IDENTITY_BYTES)
    digest = hashlib.sha256(start)
    digest.update(f"{status.st_size} {status.st_mtime_ns} {converter_version}".encode())
    return digest.hexdigest()[:16]


def _looks_like_path(name: str, path: Path) -> bool:
    return _HUB_NAME.fullmatch(name) is None or path.suffix == ".gguf" or ("/" in name and path.parent.is_dir())


def _siblings(path: Path) -> Iterable[str]:
    return [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _hub_snapshot(name: str, progress: Progress) -> Path:
    import httpx2  # what huggingface_hub speaks
    from huggingface_hub import errors, snapshot_download

    progress("download", 0.0)
    try:
        snapshot = snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_IGNORED))
    except errors.GatedRepoError as error:
        raise CheckpointError(name, "the hub asks for its terms to be accepted and for a token") from error
    except errors.RepositoryNotFoundError as error:
        hint = _suggestion(name, EMBEDDED)
        raise CheckpointError(name, f"is not a directory here, and the hub has no such model{hint}") from error
    except (OSError, ValueError, httpx2.HTTPError, errors.RevisionResolutionError, errors.XetDownloadError) as error:
        hint = _suggestion(name, EMBEDDED)
        raise CheckpointError(name, f"is not a directory here, and the hub cannot be reached{hint}") from error
    progress("download", 1.0)
    directory = _checked_directory(Path(snapshot))
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(name, "has no safetensors on the hub; weights in other formats are not read")
    return directory
