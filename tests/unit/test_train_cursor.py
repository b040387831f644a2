"""The order of the samples and how they are dealt out: everything exactly once, whatever the ranks are."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from rayllm.core.errors import ConfigError
from rayllm.train.data.cursor import Cursor, deal
from rayllm.train.data.permutation import permute

LAYOUTS = st.tuples(st.integers(1, 5), st.integers(1, 7))  # ranks, micro-batch size


def order(n: int, *key: int) -> np.ndarray:
    return permute(np.arange(n), n, key)


class TestPermutation:
    @given(n=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)))
    @settings(max_examples=200, deadline=None)
    def test_is_one(self, n, key):
        assert sorted(order(n, *key)) == list(range(n))

    @given(n=st.integers(1, 2**61), places=st.lists(st.integers(0, 2**61), max_size=20, unique=True))
    @settings(max_examples=100, deadline=None)
    def test_a_place_costs_nothing_but_itself(self, n, places):
        places = np.array(sorted({place % n for place in places}), dtype=np.int64)
        samples = permute(places, n, (1, 2))
        assert len(set(samples.tolist())) == len(places)
        assert all(0 <= sample < n for sample in samples.tolist())
        alone = [permute(places[i : i + 1], n, (1, 2))[0] for i in range(len(places))]
        assert samples.tolist() == alone

    def test_is_the_same_for_ever(self):
        """A checkpoint of today has to go on tomorrow."""
        assert order(10, 0, 0).tolist() == GOLDEN_ORDERS[0]
        assert order(10, 7, 3).tolist() == GOLDEN_ORDERS[1]

    @pytest.mark.parametrize("n", [5, 16, 100])
    def test_every_sample_comes_to_every_place_equally_often(self, n):
        """Over 4000 seeds, each place: chi-squared against the uniform distribution, Bonferroni over the places."""
        counts = np.zeros((n, n))
        for seed in range(4000):
            counts[np.arange(n), order(n, seed, 0)] += 1
        assert min(chisquare(row).pvalue for row in counts) > 0.001 / n

    def test_neighbours_in_the_data_are_not_neighbours_in_the_order(self):
        """The gaps between successive samples of a random order: adjacent ones are 2 of n pairs on average."""
        n = 100_000
        gaps = np.abs(np.diff(order(n, 3, 0)))
        assert (gaps == 1).sum() < 12
        assert abs(gaps.mean() / (n / 3) - 1) < 0.02

    def test_epochs_and_seeds_differ(self):
        orders = {tuple(order(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
        assert len(orders) == 400


class TestCursor:
    @given(
        n=st.integers(1, 60),
        seed=st.integers(0, 2**63 - 1),
        parts=st.lists(st.tuples(st.integers(1, 25), LAYOUTS), min_size=1, max_size=12),
    )
    @settings(max_examples=200, deadline=None)
    def test_resumed_and_resized_at_every_step_it_sees_what_one_rank_would(self, n, seed, parts):
        """Each step has ranks, micro-batches and a size of its own, and begins from a stored state."""
        cursor, seen = Cursor(seed=seed), []
        for count, (num_ranks, micro_batch_size) in parts:
            cursor = Cursor.from_state(dict(cursor.state), n)
            samples = cursor.next_samples(count, n)
            dealt = [
                deal(samples, micro_batch_size=micro_batch_size, rank=rank, num_ranks=num_ranks)
                for rank in range(num_ranks)
            ]
            assert len({len(batches) for batches in dealt}) == 1, "collectives would not meet"
            assert all(len(batch) <= micro_batch_size for batches in dealt for batch in batches)
            assert Counter(s for batches in dealt for batch in batches for s in batch.tolist()) == Counter(
                samples.tolist()
            )
            seen += samples.tolist()
            cursor = cursor.advanced(count, n)
        total = sum(count for count, _ in parts)
        assert seen == Cursor(seed=seed).next_samples(total, n).tolist()
        for epoch in range(total // n):
            assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
        assert (cursor.epoch, cursor.sample) == divmod(total, n)

    def test_epochs_end(self):
        cursor = Cursor(seed=0, epoch=1, sample=4)
        assert cursor.left(10, 3) == 16
        assert cursor.advanced(16, 10).left(10, 3) == 0
        assert cursor.advanced(20, 10).left(10, 3) == 0

    @pytest.mark.parametrize(
        ("state", "problem"),
        [
            ({}, "not nothing"),
            ({"seed": 0, "epoch": 0}, "expected seed, epoch and sample"),
            ({"seed": 0, "epoch": 0, "sample": 1.0}, "sample must be an integer"),
            ({"seed": 0, "epoch": True, "sample": 1}, "epoch must be an integer"),
            ({"seed": -1, "epoch": 0, "sample": 1}, "seed must be an integer of at least 0"),
            ({"seed": 0, "epoch": 0, "sample": 9}, "it is not the one that was trained on"),
        ],
    )
    def test_a_state_that_is_none(self, state, problem):
        with pytest.raises(ConfigError, match=problem):
            Cursor.from_state(state, 9)


GOLDEN_ORDERS = ([7, 6, 0, 3, 5, 8, 4, 9, 1, 2], [9, 5, 0, 7, 1, 8, 4, 3, 6, 2])
