"""A micro-batch says what is learnt from it, and refuses what would leak from one document into another."""

import re
from typing import Any

import pytest
import torch

from rayllm.core.errors import DataError
from rayllm.train.batch import IGNORE, MicroBatch

FIELDS: dict[str, Any] = {
    "token_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]),
    "loss_mask": torch.tensor([[False, True, False, True], [False, False, True, False]]),
    "document_lengths": ((2, 2), (3, 1)),
    "sample_ids": (4, 9, 2),
}

NOTHING = torch.zeros(2, 4, dtype=torch.bool)


def test_targets_positions_and_bounds() -> None:
    batch = MicroBatch(**FIELDS)
    assert batch.cu_seqlens == [0, 2, 4, 7, 8]
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 0, 1, 2, 0]
    assert batch.targets_T.tolist() == [6, IGNORE, 8, IGNORE, IGNORE, 11, IGNORE, IGNORE]
    assert (batch.num_targets, batch.num_documents) == (3, 4)


def test_a_document_that_begins_with_tokens_of_the_one_before() -> None:
    batch = MicroBatch(**{**FIELDS, "prefix_lengths": ((0, 2), (0, 3))})
    assert batch.cu_seqlens == [0, 2, 4, 7, 8]
    assert batch.prefixes == [0, 2, 0, 3]
    assert batch.attended == [(2, 2), (2, 4), (3, 3), (1, 4)]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert torch.equal(batch.targets_T, MicroBatch(**FIELDS).targets_T)
    padded = batch.padded(9, longest=3)
    assert padded.prefixes == [0, 2, 0, 0, 0, 3, 0, 0]
    assert padded.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"token_ids": FIELDS["token_ids"].int()}, "token_ids must be int64"),
        ({"token_ids": FIELDS["token_ids"].flatten()}, "token_ids must be int64"),
        ({"loss_mask": FIELDS["loss_mask"].long()}, "loss_mask must be bool"),
        ({"loss_mask": FIELDS["loss_mask"][:, :3]}, "loss_mask must be bool"),
        ({"loss_mask": torch.ones(2, 4, dtype=torch.bool)}, "first token of a document"),
        ({"document_lengths": ((4,),)}, "document_lengths has 1 rows"),
        ({"document_lengths": ((2, 3), (4,))}, "row 0: documents of"),
        ({"document_lengths": ((4,), (4, 0))}, "row 1: documents of"),
        ({"prefix_lengths": ((0, 2),)}, "prefix_lengths must have one for each of 4 documents"),
        ({"prefix_lengths": ((0, 2), (0, 0, 0))}, "prefix_lengths must have one for each of 4 documents"),
        ({"prefix_lengths": ((0, 3), (0, 0))}, "row 0: documents of [2, 2] tokens cannot lend prefixes [0, 3]"),
        ({"prefix_lengths": ((0, 0), (1, 0))}, "row 1: documents of [3, 1] tokens cannot lend"),
        ({"prefix_lengths": ((0, -1), (0, 0))}, "row 0: documents of"),
        (
            {"document_lengths": ((1, 1, 2), (3, 1)), "prefix_lengths": ((0, 1, 1), (0, 0)), "loss_mask": NOTHING},
            "row 0: documents of [1, 1, 2] tokens cannot lend",
        ),
        ({"document_values": {"reference": torch.zeros(3)}}, "reference must have one value"),
    ],
)
def test_what_a_micro_batch_refuses(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=re.escape(problem)):
        MicroBatch(**{**FIELDS, **change})
