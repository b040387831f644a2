"""A packed data set, read by random access: one row group at a time is decoded, some are kept.

Knows no ranks and no order. The files are mapped into memory and may be larger than it.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from rayllm.core.errors import DataError
from rayllm.core.tokenizer import Tokenizer
from rayllm.train.batch import MicroBatch
from rayllm.train.data.documents import Pair
from rayllm.train.data.info import DatasetInfo, read_info
from rayllm.train.data.packing import PackedRow
from rayllm.train.data.parquet import open_parquet, readable
from rayllm.train.data.rows import Kind
from rayllm.train.data.shards import UNCUT_SCHEMAS, packed_schema

_GROUPS_KEPT = 64
_FILES_KEPT = 64


class PackedDataset:
    """A sample is a packed row, a preference pair or a prompt. Not thread-safe."""

    def __init__(self, directory: Path) -> None:
        """DataError if the folder does not hold what its dataset.json says."""
        self.directory = directory
        self.info: DatasetInfo = read_info(directory)
        self.kind = self.info.kind
        self._schema = UNCUT_SCHEMAS.get(self.kind) or packed_schema(self.info.sequence_length)
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._file_starts = [0, *accumulate(file.num_rows for file in self.info.files)]
        if self._file_starts[-1] != self.info.num_rows:
            raise DataError(f"{directory}: its files have {self._file_starts[-1]} rows, not {self.info.num_rows}")
        for file in self.info.files:
            if not (directory / file.name).is_file():
                raise DataError(f"{directory / file.name}: is missing from the data set")

    def __len__(self) -> int:
        return self.info.num_rows

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """DataError if the data set was made with another tokenizer, or of conversations with another template."""
        if tokenizer.fingerprint != self.info.tokenizer_sha256:
            raise DataError(
                f"{self.directory}: was packed with another tokenizer ({self.info.tokenizer}); pack it again"
            )
        if self.info.template_sha256 not in (None, tokenizer.template_fingerprint):
            raise DataError(
                f"{self.directory}: was packed with another chat template ({self.info.tokenizer}); pack it again"
            )

    def check_files(self) -> None:
        """DataError if a file is not what it was when it was packed; all of them are read for it."""
        for info in self.info.files:
            with (self.directory / info.name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                    raise DataError(f"{self.directory / info.name}: is damaged: not what was packed; pack it again")

    def largest_token(self) -> int:
        """Of all rows, which are read for it."""
        columns = [name for name in self._schema.names if name in ("tokens", *Kind.PREFERENCE.columns)]
        largest = 0
        for number, info in enumerate(self.info.files):
            with readable(self.directory / info.name):
                for rows in self._file(number).iter_batches(columns=columns, use_threads=False):
                    largest = max(largest, *(pc.max(column.flatten()).as_py() or 0 for column in rows.columns))
        return largest

    def row(self, sample: int) -> PackedRow:
        """Of texts or conversations."""
        table, place = self._find(sample)
        tokens, mask = (table[name][place].values for name in ("tokens", "mask"))
        lengths, ids, offsets = (table[name][place].as_py() for name in table.column_names[2:])
        return PackedRow(
            tokens=tokens.to_numpy(),
            mask=mask.to_numpy(zero_copy_only=False),
            document_lengths=lengths,
            document_ids=ids,
            document_offsets=offsets,
        )

    def pair(self, sample: int) -> Pair:
        table, place = self._find(sample)
        row = table.slice(place, 1).to_pydict()
        return Pair(prompt=row["prompt"][0], chosen=row["chosen"][0], rejected=row["rejected"][0])

    def longest_pair(self) -> int:
        """The most tokens that a pair takes in a row; all of them are read for it."""
        longest = 0
        for number, info in enumerate(self.info.files):
            with readable(self.directory / info.name):
                for rows in self._file(number).iter_batches(columns=Kind.PREFERENCE.columns, use_threads=False):
                    prompt, chosen, rejected = (pc.list_value_length(column).to_numpy() for column in rows.columns)
                    longest = max(longest, int((prompt + chosen + 1 + rejected).max()))
        return longest

    def prompt(self, sample: int) -> list[int]:
        """Token ids, to be answered."""
        table, place = self._find(sample)
        ids: list[int] = table["prompt"][place].as_py()
        return ids

    def micro_batch(self, samples: Sequence[int]) -> MicroBatch:
        """Packed rows as they are, or all pairs in one row; see `pair_batch`.

        Of no samples one that teaches nothing: what a rank computes that has none left while others have.
        """
        if self.kind is Kind.PREFERENCE:
            return pair_batch([self.pair(sample) for sample in samples], samples, self.info.pad_token_id)
        length = self.info.sequence_length
        if not len(samples):
            return MicroBatch(
                token_ids=torch.full((1, length), self.info.pad_token_id),
                loss_mask=torch.zeros(1, length, dtype=torch.bool),
                document_lengths=((length,),),
                sample_ids=(),
            )
        rows = [self.row(sample) for sample in samples]
        paddings = [length - sum(row.document_lengths) for row in rows]
        return MicroBatch(
            token_ids=torch.from_numpy(np.stack([row.tokens for row in rows])).long(),
            loss_mask=torch.from_numpy(np.stack([row.mask for row in rows])),
            document_lengths=tuple(
                (*row.document_lengths, padding) if padding else tuple(row.document_lengths)
                for row, padding in zip(rows, paddings, strict=True)
            ),
            sample_ids=tuple(int(sample) for sample in samples),
        )

    def _find(self, sample: int) -> tuple[pa.Table, int]:
        """The row group that holds the sample, and where in it."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        number = bisect_right(self._file_starts, sample) - 1
        file, place = self._file(number), sample - self._file_starts[number]
        group = 0
        size = file.metadata.row_group(0).num_rows  # of all groups of a file but the last
        group, place = divmod(place, size)
        return self._group(number, group), place

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._files:
            info = self.info.files[number]
            path = self.directory / info.name
            file = open_parquet(path)
            if file.metadata.num_rows != info.num_rows or not file.schema_arrow.equals(self._schema):
                raise DataError(f"{path}: is not the file that the data set was made with")
            self._files[number] = file
            if len(self._files) > _FILES_KEPT:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]

    def _group(self, number: int, group: int) -> pa.Table:
        key = (number, group)
        if key not in self._groups:
            with readable(self.directory / self.info.files[number].name):
                self._groups[key] = self._file(number).read_row_group(group, use_threads=False)
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def pair_batch(pairs: Sequence[Pair], samples: Sequence[int], pad_token_id: int) -> MicroBatch:
    """One row of 2 * len(pairs) documents and no padding; the answers are learnt. Of no pairs two tokens.

    A pair is its prompt with the chosen answer, and the prompt's last token with the rejected one, before which come
    the prompt's other tokens: the model reads them once. The last one it reads twice, for it predicts two tokens.
    """
    documents = [part for pair in pairs for part in ((pair.prompt, pair.chosen), (pair.prompt[-1:], pair.rejected))]
    documents = documents or [([pad_token_id], []), ([pad_token_id], [])]
    ids: list[int] = []
    mask: list[bool] = []
    for read, answer in documents:
        ids += read + answer
        mask += [False] * len(read) + [True] * len(answer)
    return MicroBatch(
        token_ids=torch.tensor([ids]),
        loss_mask=torch.tensor([mask]),
        document_lengths=(tuple(len(read) + len(answer) for read, answer in documents),),
        prefix_lengths=(tuple(n for pair in pairs for n in (0, len(pair.prompt) - 1)) or (0, 0),),
        sample_ids=tuple(int(sample) for sample in samples),
    )
