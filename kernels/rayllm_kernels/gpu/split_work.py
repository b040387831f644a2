"""How the attention of a step is shared out over a GPU when only the device knows how long the sequences are.

A query block is BLOCK_Q tokens of one sequence; the keys that it sees are walked in tiles of TILE. A block's keys are
split among several programs when the blocks alone would not fill the GPU: a split is as long as the step's whole work
(tiles summed over all blocks) divided by `max_items`, the blocks and splits the GPU should be given, but no shorter
than MIN_TILES. Every program works its place out for itself with `find_work`; the host launches as many programs as
`Bounds` says there can be, and those without work return at once. So nothing waits for the lengths, and a CUDA graph of
a step serves any.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

BLOCK_B = 128  # sequences whose lengths a program takes in at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The most of everything, for `tokens` queries of `sequences` sequences of at most `max_context` tokens each."""

    tokens: int
    sequences: int
    max_context: int
    block_q: int
    tile: int
    min_tiles: int
    max_items: int

    @property
    def query_blocks(self) -> int:
        return min(self.tokens, (self.tokens + self.sequences * (self.block_q - 1)) // self.block_q)

    @property
    def may_split(self) -> bool:
        """A block of n tiles gets the whole number of splits that is nearest to n / per_split; two begin at 1.5."""
        return self.max_items > 1 and 2 * -(-self.max_context // self.tile) >= 3 * self.min_tiles

    @property
    def items(self) -> int:
        """Pairs of a query block and a split: the quotients n / per_split sum to `max_items` at most."""
        return self.query_blocks + (self.max_items if self.may_split else 0)

    @property
    def slots(self) -> int:
        """Splits of blocks that have several: a quotient from 1.5 on grows by a third at most when it is rounded."""
        return 4 * self.max_items // 3 if self.may_split else 0

    @property
    def split_blocks(self) -> int:
        """Blocks that have several splits."""
        return min(self.query_blocks, 2 * self.max_items // 3) if self.may_split else 0


@triton.jit
def _count_tiles(
    starts: tl.tensor,
    contexts: tl.tensor,
    first: tl.tensor,
    num_sequences: tl.tensor,
    window: tl.tensor,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of BLOCK_B sequences from `first`: their numbers, query blocks, and the most tiles that one of those sees."""
    b = first + tl.arange(0, BLOCK_B)
    inside = b < num_sequences
    length = tl.load(starts + b + 1, inside, 0) - tl.load(starts + b, inside, 0)
    tiles = tl.cdiv(tl.load(contexts + b, inside, 0), TILE)
    if HAS_WINDOW:
        tiles = tl.minimum(tiles, tl.cdiv(window + BLOCK_Q - 1, TILE) + 1)
    return b, tl.cdiv(length, BLOCK_Q), tiles


@triton.jit
def find_work(
    index: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    num_sequences: tl.tensor,
    window: tl.tensor,
    max_items: tl.tensor,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ONLY_SPLIT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """-> (sequence, place within it, splits of each of its query blocks, its first slot).

    `index` counts items over all sequences, or with ONLY_SPLIT the query blocks of several splits. Slots number the
    splits of such blocks. Past the end of the work the sequence is -1.
    """
    total = tl.full((), 0, tl.int64)
    for first in range(0, num_sequences, BLOCK_B):
        _, blocks, tiles = _count_tiles(
            starts, contexts, first, num_sequences, window, BLOCK_Q, TILE, HAS_WINDOW, BLOCK_B
        )
        total += tl.sum(blocks.to(tl.int64) * tiles)
    per_split = tl.maximum(tl.cdiv(total, max_items).to(tl.int32), MIN_TILES)
    sequence = tl.full((), -1, tl.int32)
    within = tl.full((), 0, tl.int32)
    its_splits = tl.full((), 1, tl.int32)  # not 0, by which the compiler's analysis of the caller would divide
    its_slot = tl.full((), 0, tl.int32)
    num_seen = tl.full((), 0, tl.int32)
    num_slots = tl.full((), 0, tl.int32)
    for first in range(0, num_sequences, BLOCK_B):
        b, blocks, tiles = _count_tiles(
            starts, contexts, first, num_sequences, window, BLOCK_Q, TILE, HAS_WINDOW, BLOCK_B
        )
        splits = tl.maximum((tiles + per_split // 2) // per_split, 1)
        slots = tl.where(splits > 1, blocks * splits, 0)
        counted = tl.where(splits > 1, blocks, 0) if ONLY_SPLIT else blocks * splits
        begin = num_seen + tl.cumsum(counted, 0) - counted
        mine = (index >= begin) & (index < begin + counted)
        sequence += tl.sum(tl.where(mine, b + 1, 0))
        within += tl.sum(tl.where(mine, index - begin, 0))
        its_splits += tl.sum(tl.where(mine, splits - 1, 0))
        its_slot += tl.sum(tl.where(mine, num_slots + tl.cumsum(slots, 0) - slots, 0))
        num_seen += tl.sum(counted)
        num_slots += tl.sum(slots)
    return sequence, within, its_splits, its_slot
