"""From the tables that workers make to the files of a packed data set, and the counts of what went in."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from numpy.typing import NDArray

from rayllm.core.errors import DataError
from rayllm.train.data.documents import Document
from rayllm.train.data.packing import PackedRow, Packer
from rayllm.train.data.rows import Kind
from rayllm.train.data.shards import UNCUT_SCHEMAS, ShardWriter, packed_schema, packed_table


class Writing(Protocol):
    def add(self, path: str, first_document: int, table: pa.Table) -> None:
        """Rows of one file, whose row 0 is document `first_document`; see `tokenize_chunk`."""

    def finish(self) -> dict[str, Any]:
        """The fields of `DatasetInfo` that are known only now."""


@dataclass(kw_only=True, slots=True)
class _Counts:
    """See `DatasetInfo`."""

    num_rows: int = 0
    num_documents: int = 0
    num_pieces: int = 0
    num_left_out: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_empty: int = 0
    num_dropped: int = 0
    num_padding: int = 0


class PackedWriting:
    """Texts and conversations."""

    def __init__(self, directory: Path, packer: Packer, *, sequence_length: int) -> None:
        self._packer, self._sequence_length = packer, sequence_length
        self._schema = packed_schema(sequence_length)
        self._writer = ShardWriter(directory, self._schema, row_tokens=sequence_length)
        self._counts = _Counts()
        self._waiting: list[PackedRow] = []

    def add(self, path: str, first_document: int, table: pa.Table) -> None:
        tokens, masks = _arrays(table["tokens"]), _arrays(table["mask"])
        for index, ids, mask in zip(table["index"].to_pylist(), tokens, masks, strict=True):
            if not len(ids):
                self._counts.num_empty += 1
                continue
            self._counts.num_documents += 1
            self._counts.num_tokens += len(ids)
            self._counts.num_targets += int(mask.sum())
            self._take(self._packer.add(first_document + index, Document(tokens=ids, mask=mask)))

    def finish(self) -> dict[str, Any]:
        self._take(self._packer.finish())
        self._write()
        self._counts.num_left_out = self._packer.num_left_out
        return {**asdict(self._counts), "files": self._writer.close()}

    def _take(self, rows: Iterable[PackedRow]) -> None:
        for row in rows:
            self._counts.num_rows += 1
            self._counts.num_pieces += len(row.document_ids)
            self._counts.num_padding += self._sequence_length - sum(row.document_lengths)
            self._waiting.append(row)
            if len(self._waiting) == self._writer.group_rows:
                self._write()

    def _write(self) -> None:
        if self._waiting:
            self._writer.write(packed_table(self._waiting, self._schema))
            self._waiting.clear()


class UncutWriting:
    """Preference pairs and prompts, which are never cut."""

    def __init__(self, directory: Path, kind: Kind, *, sequence_length: int, drop_long: bool) -> None:
        self._columns, self._schema = kind.columns, UNCUT_SCHEMAS[kind]
        self._sequence_length = sequence_length
        self._drop_long = drop_long
        self._writer = ShardWriter(directory, self._schema, row_tokens=sequence_length)
        self._counts = _Counts()
        self._waiting: list[dict[str, Any]] = []

    def add(self, path: str, first_document: int, table: pa.Table) -> None:
        for row in table.select(["index", *self._columns]).to_pylist():
            index = row.pop("index")
            prompt, *answers = (len(row[column]) for column in self._columns)
            longest = prompt + max(answers, default=0)
            if longest > self._sequence_length:
                if not self._drop_long:
                    what = "prompt and answer have" if answers else "the prompt has"
                    raise DataError(
                        f"{path}, row {index} (from 0): {what} {longest} tokens, more than {self._sequence_length};"
                        " raise --sequence-length, or leave such rows out with --drop-long"
                    )
                self._counts.num_dropped += 1
                continue
            documents = len(answers) or 1
            self._counts.num_rows += 1
            self._counts.num_documents += documents
            self._counts.num_pieces += documents
            self._counts.num_tokens += documents * prompt + sum(answers)
            self._counts.num_targets += sum(answers)
            self._waiting.append({"document_id": first_document + index, **row})
            if len(self._waiting) == self._writer.group_rows:
                self._write()

    def finish(self) -> dict[str, Any]:
        self._write()
        return {**asdict(self._counts), "files": self._writer.close()}

    def _write(self) -> None:
        if self._waiting:
            self._writer.write(pa.Table.from_pylist(self._waiting, schema=self._schema))
            self._waiting.clear()


def _arrays(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """One array for each row of a column of lists."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # of no chunk at all
        return []
    values, offsets = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    return [values[first:last] for first, last in pairwise(offsets)]
