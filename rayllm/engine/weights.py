"""Weights that take the place of others in a running engine: what they are called, and whether they can.

They can if nothing but the weights is new: the same decoder, so that the pages of the KV cache fit; the same dtype; and
the same tokenizer, for prompts are tokenized before it is known which weights answer.
"""

import dataclasses
from pathlib import Path

import msgspec

from rayllm.core.errors import CheckpointError
from rayllm.core.tokenizer import Tokenizer
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.manifest import check_manifest
from rayllm.models.weight_version import weight_version

# All that `Tokenizer.load` may read, but for config.json, whose part in it `DecoderSpec` has.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Weights(msgspec.Struct, frozen=True):
    """`version` names the content of `directory`, see `rayllm.models.weight_version`."""

    version: str
    directory: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Weights":
        return cls(weight_version(checkpoint.directory), str(checkpoint.directory))

    def open(self) -> Checkpoint:
        """Raises CheckpointError also when the directory no longer holds what the version names."""
        checkpoint = Checkpoint.open(self.directory)
        if weight_version(checkpoint.directory) != self.version:
            raise CheckpointError(self.directory, f"holds other weights than {self.version}, as it did before")
        return checkpoint


def check_replacement(checkpoint: Checkpoint, running: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError unless `checkpoint` is whole, as far as its manifest tells, and differs from what is
    running by its weights alone. Reads the files that a manifest names whole."""
    _check_same_decoder(checkpoint, running)
    if not all(_same_file(checkpoint.directory / name, running.directory / name) for name in _TOKENIZER_FILES):
        _check_same_tokenizer(checkpoint, tokenizer)
    check_manifest(checkpoint.directory)


def _check_same_decoder(checkpoint: Checkpoint, running: Checkpoint) -> None:
    for field in dataclasses.fields(running.spec):
        new, old = getattr(checkpoint.spec, field.name), getattr(running.spec, field.name)
        if new != old:
            raise CheckpointError(
                checkpoint.directory, f"another architecture than the running model's: {field.name} is {new}, not {old}"
            )
    if checkpoint.dtype != running.dtype:
        raise CheckpointError(
            checkpoint.directory, f"the weights are {checkpoint.dtype}, those of the running model {running.dtype}"
        )


def _same_file(one: Path, other: Path) -> bool:
    if not one.is_file() or not other.is_file():
        return not one.exists() and not other.exists()
    return one.read_bytes() == other.read_bytes()


def _check_same_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Where the files differ, what they come to may not. Loading a large vocabulary holds Python's lock for some tenths
    of a second, and steps up with it; training copies the files, so that this is seldom needed."""
    other = Tokenizer.load(checkpoint.directory)
    for what, is_same in (
        ("tokenizer", other.fingerprint == tokenizer.fingerprint),
        ("end-of-sequence tokens", other.eos_token_ids == tokenizer.eos_token_ids),
        ("chat template", other.template_fingerprint == tokenizer.template_fingerprint),
    ):
        if not is_same:
            raise CheckpointError(checkpoint.directory, f"the {what} differs from that of the running model")
