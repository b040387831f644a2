"""Counter-based random numbers: a pure function of (seed, counter), with no state to keep, save or restore.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), checked in
the tests against the known-answer vectors of the authors' Random123. Knows nothing of tokens or of batches.
"""

import numpy as np
from numpy.typing import NDArray

UNIFORM_BITS = 62

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_MASK_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


def philox4x32(counter_4B: NDArray[np.uint64], key_2B: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds of Philox for B counters at once -> four words each, [4, B]. Every word is 32 bits held in 64."""
    c0, c1, c2, c3 = counter_4B
    key = key_2B
    for _ in range(_ROUNDS):
        products = _MULTIPLIERS * np.stack((c0, c2))  # 32 x 32 bits never overflow 64
        (high0, high1), (low0, low1) = products >> _SHIFT_32, products & _MASK_32
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = (key + _WEYL) & _MASK_32
    return np.stack((c0, c1, c2, c3))


def uniform_bits(seeds_B: NDArray[np.uint64], counters_B: NDArray[np.uint64]) -> NDArray[np.int64]:
    """One integer uniform in [0, 2**62) for each (seed, counter); divided by 2**62 it is a uniform in [0, 1)."""
    zeros = np.zeros_like(counters_B)
    counter = np.stack((counters_B & _MASK_32, counters_B >> _SHIFT_32, zeros, zeros))
    words = philox4x32(counter, np.stack((seeds_B & _MASK_32, seeds_B >> _SHIFT_32)))
    bits: NDArray[np.uint64] = (words[1] << _SHIFT_32 | words[0]) >> np.uint64(64 - UNIFORM_BITS)
    return bits.astype(np.int64)
