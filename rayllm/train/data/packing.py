"""From documents to rows of one length.

Two ways, as the field has them. `ConcatPacker`, for texts: every row is full, and a document that reaches a row's end
goes on in the next one. `BestFitPacker`, for conversations: none that fits into a row is ever cut, so that every answer
is learnt after all of its question, and rows end in padding.

A document that goes on in another row begins there with the last token of the part before, not to be learnt again: so
each token is learnt exactly once, from the one before it. Nothing is dropped but the pieces of a conversation in which
nothing is learnt, such as a long question: no answer would see them. Knows no files and no tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rayllm.train.data.documents import Document


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """`tokens` int32 [S] and `mask` bool [S], padding at the end, its mask False.

    Piece i of the row has `document_lengths[i]` tokens: those of document `document_ids[i]` from its token
    `document_offsets[i]` on. The lengths sum to S less the padding.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    document_lengths: list[int]
    document_ids: list[int]
    document_offsets: list[int]


class Packer(Protocol):
    num_left_out: int  # pieces

    def add(self, document_id: int, document: Document) -> Iterator[PackedRow]:
        """The rows that are complete now."""

    def finish(self) -> Iterator[PackedRow]:
        """The rest."""


class ConcatPacker:
    num_left_out = 0

    def __init__(self, sequence_length: int, *, pad_token_id: int) -> None:
        self._length = sequence_length
        self._pad_token_id = pad_token_id
        self._row = _OpenRow()

    def add(self, document_id: int, document: Document) -> Iterator[PackedRow]:
        offset = 0
        while True:
            end = min(offset + self._length - self._row.length, len(document.tokens))
            self._row.append(document_id, document, offset, end)
            if self._row.length == self._length:
                yield self._row.close(self._length, self._pad_token_id)
                self._row = _OpenRow()
            if end == len(document.tokens):
                return
            offset = end - 1

    def finish(self) -> Iterator[PackedRow]:
        if self._row.length:
            yield self._row.close(self._length, self._pad_token_id)
            self._row = _OpenRow()


class BestFitPacker:
    """Keeps `max_open` rows open and puts a document where the least room is left over; deterministic."""

    def __init__(self, sequence_length: int, *, pad_token_id: int, max_open: int = 64) -> None:
        self._length = sequence_length
        self._pad_token_id = pad_token_id
        self._max_open = max_open
        self.num_left_out = 0
        self._open: list[_OpenRow] = []

    def add(self, document_id: int, document: Document) -> Iterator[PackedRow]:
        offset = 0
        while len(document.tokens) - offset > self._length:
            if self._teaches(document, offset, offset + self._length):
                row = _OpenRow()
                row.append(document_id, document, offset, offset + self._length)
                yield row.close(self._length, self._pad_token_id)
            offset += self._length - 1
        if not self._teaches(document, offset, len(document.tokens)):
            return
        size = len(document.tokens) - offset
        fitting = [row for row in self._open if row.length + size <= self._length]
        if fitting:
            best = max(fitting, key=lambda row: row.length)
        else:
            best = _OpenRow()
            self._open.append(best)
        best.append(document_id, document, offset, len(document.tokens))
        if best.length == self._length:
            yield self._close(best)
        elif len(self._open) > self._max_open:
            yield self._close(max(self._open, key=lambda row: row.length))

    def finish(self) -> Iterator[PackedRow]:
        while self._open:
            yield self._close(self._open[0])

    def _teaches(self, document: Document, first: int, last: int) -> bool:
        teaches = bool(document.mask[first + 1 : last].any())
        self.num_left_out += not teaches
        return teaches

    def _close(self, row: "_OpenRow") -> PackedRow:
        self._open.remove(row)
        return row.close(self._length, self._pad_token_id)


@dataclass(kw_only=True, slots=True, eq=False)
class _OpenRow:
    length: int = 0
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    document_ids: list[int] = field(default_factory=list)
    document_offsets: list[int] = field(default_factory=list)

    def append(self, document_id: int, document: Document, first: int, last: int) -> None:
        mask = document.mask[first:last].copy()
        mask[:1] = False  # the first token of a document never is a target; a repeated one was learnt before
        self.tokens.append(document.tokens[first:last])
        self.masks.append(mask)
        self.document_ids.append(document_id)
        self.document_offsets.append(first)
        self.length += last - first

    def close(self, sequence_length: int, pad_token_id: int) -> PackedRow:
        padding = sequence_length - self.length
        return PackedRow(
            tokens=np.concatenate([*self.tokens, np.full(padding, pad_token_id, dtype=np.int32)]),
            mask=np.concatenate([*self.masks, np.zeros(padding, dtype=np.bool_)]),
            document_lengths=[len(piece) for piece in self.tokens],
            document_ids=self.document_ids,
            document_offsets=self.document_offsets,
        )
