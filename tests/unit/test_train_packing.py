"""Packing against its promises: whatever the documents are, nothing is lost, mixed up or learnt twice."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.train.data.documents import Document
from rayllm.train.data.packing import BestFitPacker, ConcatPacker, PackedRow

PAD = -7

documents_strategy = st.lists(
    st.integers(1, 40).flatmap(
        lambda size: st.tuples(
            st.lists(st.integers(0, 1000), min_size=size, max_size=size),
            st.lists(st.booleans(), min_size=size, max_size=size),
        )
    ),
    max_size=25,
)


def document(tokens, mask) -> Document:
    mask = np.array(mask, dtype=np.bool_)
    mask[:1] = False
    return Document(tokens=np.array(tokens, dtype=np.int32), mask=mask)


def pack(packer, documents) -> list[PackedRow]:
    rows = [row for number, one in enumerate(documents) for row in packer.add(number, one)]
    return rows + list(packer.finish())


def pieces(rows):
    """(document, offset, tokens, mask) of all pieces, and what is left of each row."""
    for row in rows:
        start = 0
        for length, number, offset in zip(row.document_lengths, row.document_ids, row.document_offsets, strict=True):
            yield number, offset, row.tokens[start : start + length], row.mask[start : start + length]
            start += length
        assert (row.tokens[start:] == PAD).all()
        assert not row.mask[start:].any()


def best_fit_of_two(length, **settings):
    return BestFitPacker(length, max_open=2, **settings)


@pytest.mark.parametrize("make", [ConcatPacker, BestFitPacker, best_fit_of_two])
@given(documents=documents_strategy, length=st.integers(2, 33))
@settings(max_examples=150, deadline=None)
def test_every_token_is_there_and_every_target_exactly_once(make, documents, length):
    """But for the pieces of a conversation in which there is no target."""
    documents = [document(*one) for one in documents]
    packer = make(length, pad_token_id=PAD)
    rows = pack(packer, documents)
    found = defaultdict(list)
    for number, offset, tokens, mask in pieces(rows):
        assert len(tokens) == len(mask) > 0
        assert not mask[0], "what lies before a piece is another document"
        found[number].append((offset, tokens, mask))
    conversations = make is not ConcatPacker
    assert all(mask.any() for parts in found.values() for _, _, mask in parts) or not conversations
    for number, one in enumerate(documents):
        parts = found.pop(number, [])
        tokens = np.full(len(documents[number].tokens), PAD)
        learnt = np.zeros(len(tokens), dtype=int)
        for offset, part, mask in parts:
            tokens[offset : offset + len(part)] = part
            learnt[offset : offset + len(part)] += mask
        there = tokens == one.tokens
        assert there.all() or (conversations and (tokens[~there] == PAD).all() and packer.num_left_out)
        assert (learnt == one.mask).all()
    assert not found
    for row in rows:
        assert row.tokens.shape == row.mask.shape == (length,)
        assert row.tokens.dtype == np.int32


@given(documents=documents_strategy, length=st.integers(2, 33))
@settings(max_examples=100, deadline=None)
def test_texts_are_in_order_and_only_the_last_row_is_padded(documents, length):
    rows = pack(ConcatPacker(length, pad_token_id=PAD), [document(*one) for one in documents])
    assert all(sum(row.document_lengths) == length for row in rows[:-1])
    places = [(number, offset) for number, offset, _, _ in pieces(rows)]
    assert places == sorted(places)


@given(documents=documents_strategy, length=st.integers(2, 33))
@settings(max_examples=100, deadline=None)
def test_a_conversation_that_fits_is_never_cut(documents, length):
    documents = [document(*one) for one in documents]
    for number, offset, tokens, _ in pieces(pack(BestFitPacker(length, pad_token_id=PAD), documents)):
        if len(documents[number].tokens) <= length:
            assert offset == 0
            assert len(tokens) == len(documents[number].tokens)


def test_best_fit_wastes_little():
    generator = np.random.default_rng(0)
    documents = [document([1] * size, [True] * size) for size in generator.integers(20, 400, size=2000)]
    rows = pack(BestFitPacker(512, pad_token_id=PAD), documents)
    padding = 1 - sum(len(one.tokens) for one in documents) / (512 * len(rows))
    assert padding < 0.03
