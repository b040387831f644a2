"""What a packed data set says of itself: `dataset.json` beside its Parquet files, written last.

From it follows whether two runs saw the same data, and which row of which file a packed document was.
"""

import hashlib
from pathlib import Path

import msgspec

from rayllm.core.errors import DataError
from rayllm.train.data.rows import Kind

INFO_NAME = "dataset.json"
FORMAT = 2


class SourceInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Row i of the file, from 0, is document `first_document` + i."""

    path: str
    sha256: str
    num_rows: int
    first_document: int


class FileInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    sha256: str
    num_rows: int


class DatasetInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`num_tokens` counts each token of a document once; `num_targets` those of them that are learnt.

    `num_pieces`: a document that is cut has several. A pair counts as two documents. `num_left_out`: pieces of
    conversations in which nothing is learnt. `num_empty`: texts without a character, left out. `num_dropped`: pairs or
    prompts longer than `sequence_length`, left out because that was asked for. `num_padding`: tokens that fill rows up.
    """

    format: int = FORMAT
    kind: Kind
    sequence_length: int
    tokenizer: str
    tokenizer_sha256: str
    template_sha256: str | None
    vocab_size: int
    pad_token_id: int
    num_rows: int
    num_documents: int
    num_pieces: int
    num_left_out: int
    num_tokens: int
    num_targets: int
    num_empty: int
    num_dropped: int
    num_padding: int
    sources: tuple[SourceInfo, ...]
    files: tuple[FileInfo, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data: equal if and only if all files are."""
        return hashlib.sha256(" ".join(file.sha256 for file in self.files).encode()).hexdigest()

    def place_of(self, document_id: int) -> str:
        """The file and its row that the document was, for a person."""
        source = next(s for s in reversed(self.sources) if s.first_document <= document_id)
        return f"{source.path}, row {document_id - source.first_document} (from 0)"


class _Format(msgspec.Struct):
    format: int = FORMAT


def write_info(directory: Path, info: DatasetInfo) -> None:
    (directory / INFO_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n")


def read_info(directory: Path) -> DatasetInfo:
    """DataError if the folder holds no packed data set, or one of another format."""
    path = directory / INFO_NAME
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=_Format).format
        if found != FORMAT:
            raise DataError(f"{path}: format {found}; this version reads {FORMAT}; pack the data again")
        return msgspec.json.decode(content, type=DatasetInfo)
    except OSError as error:
        raise DataError(
            f"{directory}: holds no packed data set ({INFO_NAME}: {error.strerror}); make one with `rayllm data pack`"
        ) from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise DataError(f"{path}: {error}") from None
