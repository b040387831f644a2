"""Who owns which KV block, and which blocks can be shared by content.

A block holds the keys and values of `block_size` consecutive tokens. Blocks are reference counted. A full block
whose KV is computed may be registered under a digest of everything that its KV depends on (the chain of tokens up to
its end, and the caller's cache key), so that another sequence with the same prefix takes it instead of computing it.
A block that nobody references stays in the cache until its memory is needed; the least recently freed goes first.

Every operation is O(1) for each block it touches. Knows nothing of sequences, requests or memory.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice

DIGEST_SIZE = 32  # bytes; one tenant must not be able to construct a collision with the prefix of another


def root_hash(cache_key: bytes) -> bytes:
    """The parent of a first block: whatever else the KV depends on (weights, scaling), as bytes."""
    return blake2b(cache_key, digest_size=DIGEST_SIZE).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block, given that of the block before it (or the root)."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_SIZE).digest()


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_freed = 0  # blocks that became free, ever; grows whenever an allocation that failed may succeed
        self._ref_counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._cached: OrderedDict[bytes, int] = OrderedDict()  # last: what was cached or found last
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first: the next to be reused

    @property
    def num_free(self) -> int:
        """Blocks that nobody references; those still in the cache count."""
        return len(self._free)

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a chain of digests. Takes no reference."""
        hits: list[int] = []
        for digest in digests:
            block = self._cached.get(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def take(self, hits: Sequence[int], num_new: int, *, reserve: int = 0) -> list[int] | None:
        """References `hits` and allocates `num_new` more; None, and nothing changed, if that leaves fewer than
        `reserve` blocks free."""
        num_idle_hits = sum(1 for block in hits if not self._ref_counts[block])
        if num_idle_hits + num_new + reserve > len(self._free):
            return None
        for block in reversed(hits):
            if not self._ref_counts[block]:
                del self._free[block]
            self._ref_counts[block] += 1
            if (digest := self._digests[block]) is not None:
                self._cached.move_to_end(digest)
        return [*hits, *(self._allocate() for _ in range(num_new))]

    def _allocate(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._ref_counts[block] = 1
        digest = self._digests[block]
        if digest is not None:
            del self._cached[digest]
            self._digests[block] = None
        return block

    def cache(self, block: int, digest: bytes) -> None:
        """Makes a full block findable; its KV must be computed. If an equal block is cached already, that one stays
        and this one remains private."""
        if digest not in self._cached:
            self._cached[digest] = block
            self._digests[block] = digest

    def free(self, block_table: Sequence[int]) -> None:
        """Drops one reference of each block. The table's end goes first when memory is needed: a prefix is worth
        more than what follows it. What cannot be found again goes before everything."""
        for block in reversed(block_table):
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                self._free[block] = None
                self.num_freed += 1
                if self._digests[block] is None:
                    self._free.move_to_end(block, last=False)

    def forget_cache(self) -> None:
        """The contents of every block are lost."""
        self._cached.clear()
        self._digests = [None] * self.num_blocks

    def recent_digests(self, limit: int) -> list[bytes]:
        """Of at most so many cached blocks, those cached or found last first."""
        return list(islice(reversed(self._cached), limit))

    def digest(self, block: int) -> bytes | None:
        """What the block is cached under; None if it is private."""
        return self._digests[block]

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the references are those of `block_tables` and the books agree."""
        expected: Counter[int] = Counter()
        for table in block_tables:
            assert len(set(table)) == len(table), f"a block occurs twice in table {list(table)}"
            expected.update(table)
        for block, count in enumerate(self._ref_counts):
            assert count == expected[block], f"block {block}: {count} references, {expected[block]} owners"
            assert (block in self._free) == (count == 0), (
                f"block {block}: {count} references, but its free state differs"
            )
        assert len(self._free) == sum(1 for count in self._ref_counts if count == 0), "an unknown block is free"
        named = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert named == self._cached, "the cache's two directions differ"
