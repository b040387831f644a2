"""Weights that take the place of others in a running engine: what they are called, and whether they can.

They can if nothing but the weights is new: the same decoder, so that the pages of the KV cache fit; the same dtype; and
the same tokenizer, for prompts are tokenized before it is known which weights answer.
"""

import dataclasses

import msgspec

from rayllm.core.errors import CheckpointError
from rayllm.core.tokenizer import Tokenizer
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.manifest import check_manifest
from rayllm.models.weight_version import weight_version


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
    other = Tokenizer.load(checkpoint.directory)
    for what, is_same in (
        ("tokenizer", other.fingerprint == tokenizer.fingerprint),
        ("end-of-sequence tokens", other.eos_token_ids == tokenizer.eos_token_ids),
        ("chat template", other.template_fingerprint == tokenizer.template_fingerprint),
    ):
        if not is_same:
            raise CheckpointError(checkpoint.directory, f"the {what} differs from that of the running model")
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
