"""What one forward and backward sees: rows of documents, and which of their tokens are to be learnt.

Every recipe's data ends in a `MicroBatch`, and every recipe's loss begins with one. Knows no tokenizer, no model, no
rank. Letters: B rows, S tokens of a row, T = B * S tokens flat, row after row, N documents of all rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from rayllm.core.errors import DataError

IGNORE = -100  # the target of a token after which nothing is to be learnt


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """`token_ids` [B, S] int64. A row is whole documents, one after another; attention and positions begin anew at
    each.

    `loss_mask` [B, S] bool says of a token that it is a target: that the token before it is to predict it. The first
    token of a document never is one, since what lies before it is another document.
    `document_lengths`: of every row the lengths of its documents, all at least 1, whose sum is S. What pads a row is a
    document like any other (or several) whose mask is False throughout; its ids may be anything in the vocabulary.
    `prefix_lengths`: of every row, for each of its documents, with how many of the first tokens of the document before
    it it begins too, in front of its own: they lie in the row once, and count for positions and attention of both. A
    document lends its tokens or borrows some, not both. (): none does.
    `sample_ids`: the data set's indices of the samples in here, padding left out, in the order of the rows.
    `document_values`: what a recipe knows of each document, [N] each (a reference's log-probability, say); for
    preference pairs documents 2i and 2i + 1 are the chosen and the rejected one of a pair.
    `token_values`: what it knows of each prediction, [B, S] each: of a target's, where the token before it stands.

    Raises DataError where a shape, a dtype, a length or the mask of a first token is not so.
    """

    token_ids: Tensor
    loss_mask: Tensor
    document_lengths: tuple[tuple[int, ...], ...]
    prefix_lengths: tuple[tuple[int, ...], ...] = ()
    sample_ids: tuple[int, ...]
    document_values: Mapping[str, Tensor] = field(default_factory=dict)
    token_values: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.token_ids.shape)
        if len(shape) != 2 or self.token_ids.dtype != torch.int64:
            raise DataError(f"token_ids must be int64 [B, S], not {self.token_ids.dtype} {list(shape)}")
        if tuple(self.loss_mask.shape) != shape or self.loss_mask.dtype != torch.bool:
            found = f"{self.loss_mask.dtype} {list(self.loss_mask.shape)}"
            raise DataError(f"loss_mask must be bool {list(shape)}, as token_ids, not {found}")
        if len(self.document_lengths) != shape[0]:
            raise DataError(f"document_lengths has {len(self.document_lengths)} rows, token_ids has {shape[0]}")
        for row, lengths in enumerate(self.document_lengths):
            if sum(lengths) != shape[1] or min(lengths, default=0) < 1:
                raise DataError(f"row {row}: documents of {list(lengths)} tokens do not fill a row of {shape[1]}")
        if self.prefix_lengths and [*map(len, self.prefix_lengths)] != [*map(len, self.document_lengths)]:
            raise DataError(f"prefix_lengths must have one for each of {self.num_documents} documents")
        for row, prefixes in enumerate(self.prefix_lengths):
            lengths = self.document_lengths[row]
            lent = [0, *(0 if prefix else length for length, prefix in zip(lengths, prefixes, strict=True))]
            if not all(0 <= prefix <= most for prefix, most in zip(prefixes, lent, strict=False)):
                raise DataError(f"row {row}: documents of {list(lengths)} tokens cannot lend prefixes {list(prefixes)}")
        if self.loss_mask.flatten()[self.cu_seqlens[:-1]].any():
            raise DataError("loss_mask is set on the first token of a document, which nothing predicts")
        for name, values in self.document_values.items():
            if tuple(values.shape) != (self.num_documents,):
                raise DataError(f"{name} must have one value for each of {self.num_documents} documents")
        for name, values in self.token_values.items():
            if values.shape != self.token_ids.shape:
                raise DataError(f"{name} must have one value for each token, not {list(values.shape)}")

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.document_lengths))

    @property
    def num_targets(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def cu_seqlens(self) -> list[int]:
        """[N + 1]: document n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of all rows, flat."""
        return [0, *accumulate(chain.from_iterable(self.document_lengths))]

    @property
    def prefixes(self) -> list[int]:
        """[N], those of all rows; see `prefix_lengths`."""
        return [*chain.from_iterable(self.prefix_lengths)] or [0] * self.num_documents

    @property
    def attended(self) -> list[tuple[int, int]]:
        """[N]: of each document, how many queries it has and how many keys."""
        lengths = chain.from_iterable(self.document_lengths)
        return [(length, prefix + length) for length, prefix in zip(lengths, self.prefixes, strict=True)]

    @property
    def positions_T(self) -> Tensor:
        """Of each token in its document, from 0, or from the length of what it begins with."""
        lengths_N = torch.tensor(list(chain.from_iterable(self.document_lengths)), device=self.token_ids.device)
        starts_N = lengths_N.cumsum(0) - lengths_N - torch.tensor(self.prefixes, device=lengths_N.device)
        return torch.arange(self.token_ids.numel(), device=lengths_N.device) - starts_N.repeat_interleave(lengths_N)

    @property
    def targets_T(self) -> Tensor:
        """The token that each token is to predict, `IGNORE` where there is none."""
        targets_BS = torch.full_like(self.token_ids, IGNORE)
        targets_BS[:, :-1] = self.token_ids[:, 1:].masked_fill(~self.loss_mask[:, 1:], IGNORE)
        return targets_BS.flatten()

    def padded(self, length: int, longest: int) -> "MicroBatch":
        """The same in rows of `length` tokens, filled with documents of at most `longest` that teach nothing."""
        assert not self.document_values, "what is known of documents is not known of those that pad"
        rows, missing = len(self.document_lengths), length - self.token_ids.shape[1]
        full, rest = divmod(missing, longest)
        padding = (longest,) * full + ((rest,) if rest else ())
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, self.token_ids.new_zeros(rows, missing)], 1),
            loss_mask=torch.cat([self.loss_mask, self.loss_mask.new_zeros(rows, missing)], 1),
            document_lengths=tuple((*lengths, *padding) for lengths in self.document_lengths),
            prefix_lengths=tuple((*prefixes, *(0 for _ in padding)) for prefixes in self.prefix_lengths),
            token_values={
                name: torch.cat([values, values.new_zeros(rows, missing)], 1)
                for name, values in self.token_values.items()
            },
        )

    def to(self, device: torch.device) -> "MicroBatch":
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            loss_mask=self.loss_mask.to(device),
            document_values={name: values.to(device) for name, values in self.document_values.items()},
            token_values={name: values.to(device) for name, values in self.token_values.items()},
        )
