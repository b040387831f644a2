"""Packed rows to Parquet files of a bounded size, in small row groups, so that a row can be read on its own."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayllm.train.data.info import FileInfo
from rayllm.train.data.packing import PackedRow
from rayllm.train.data.rows import Kind

_GROUP_TOKENS = 1 << 13  # read whole for any one row of them
_FILE_TOKENS = 1 << 25
_TOKENS = pa.list_(pa.int32())


def packed_schema(sequence_length: int) -> pa.Schema:
    """See `PackedRow`."""
    return pa.schema(
        [
            pa.field("tokens", pa.list_(pa.int32(), sequence_length), nullable=False),
            pa.field("mask", pa.list_(pa.bool_(), sequence_length), nullable=False),
            pa.field("document_lengths", _TOKENS, nullable=False),
            pa.field("document_ids", pa.list_(pa.int64()), nullable=False),
            pa.field("document_offsets", _TOKENS, nullable=False),
        ]
    )


def _uncut_schema(*columns: str) -> pa.Schema:
    fields = [pa.field(name, _TOKENS, nullable=False) for name in columns]
    return pa.schema([pa.field("document_id", pa.int64(), nullable=False), *fields])


# Of the kinds whose rows are never cut nor put together: each as it came.
UNCUT_SCHEMAS: Mapping[Kind, pa.Schema] = {
    kind: _uncut_schema(*kind.columns) for kind in (Kind.PREFERENCE, Kind.PROMPT)
}


def packed_table(rows: Sequence[PackedRow], schema: pa.Schema) -> pa.Table:
    length = schema.field("tokens").type.list_size
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([row.tokens for row in rows])), length),
        pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([row.mask for row in rows])), length),
        *([getattr(row, name) for row in rows] for name in schema.names[2:]),
    ]
    return pa.table(columns, schema=schema)


class ShardWriter:
    """Writes `data-00000.parquet` and so on into a directory; `close` says what there is."""

    def __init__(self, directory: Path, schema: pa.Schema, *, row_tokens: int) -> None:
        self._directory = directory
        self._schema = schema
        self.group_rows = max(1, _GROUP_TOKENS // row_tokens)
        self._file_groups = max(1, _FILE_TOKENS // (row_tokens * self.group_rows))
        self._files: list[FileInfo] = []
        self._writer: pq.ParquetWriter | None = None
        self._groups = 0
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        """One row group: `group_rows` rows, except the last time."""
        if self._writer is None:
            # checksums, so that a page that rots is found when it is read and not learnt
            self._writer = pq.ParquetWriter(
                self._path, self._schema, compression="zstd", use_dictionary=False, write_page_checksum=True
            )
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._groups += 1
        self._rows += table.num_rows
        if self._groups == self._file_groups:
            self._finish_file()

    def close(self) -> tuple[FileInfo, ...]:
        self._finish_file()
        return tuple(self._files)

    @property
    def _path(self) -> Path:
        return self._directory / f"data-{len(self._files):05d}.parquet"

    def _finish_file(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._files.append(FileInfo(name=self._path.name, sha256=sha256, num_rows=self._rows))
        self._writer, self._groups, self._rows = None, 0, 0
