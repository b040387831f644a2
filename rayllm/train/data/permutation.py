"""A random order of n samples that is computed, not stored: place i of it needs i, n and a key, and nothing else.

A balanced Feistel network over the smallest power of four that is at least n is a permutation whatever its round
function is (Luby and Rackoff 1988); places that it sends beyond n are sent through it again until they are not (cycle
walking, Black and Rogaway 2002), on average less than four times. The round function is SplitMix64's finalizer (Steele
et al. 2014): good enough to shuffle with, no cipher.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(places: NDArray[np.int64], n: int, key: Sequence[int]) -> NDArray[np.int64]:
    """The samples at these places of the order that `key` names; all of 0 <= place < n, n < 2**62."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = _round_keys(key)
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        walking = values[outside]
        left, right = walking >> half, walking & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & low)
        walking = left << half | right
        values[outside] = walking
        outside = outside[walking >= n]
    return values.astype(np.int64)


def _round_keys(key: Sequence[int]) -> NDArray[np.uint64]:
    state = np.zeros(1, dtype=np.uint64)
    for number in key:
        state = _mix(state ^ np.uint64(number % (1 << 64)) ^ _GOLDEN)
    return _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
