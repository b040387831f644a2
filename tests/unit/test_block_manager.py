import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rayllm.scheduler.block_manager import BlockManager, block_hash, root_hash

TOKENS = list(range(40))


def chain(tokens: list[int], block_size: int, key: bytes = b"") -> list[bytes]:
    digests = [root_hash(key)]
    for start in range(0, len(tokens) - block_size + 1, block_size):
        digests.append(block_hash(digests[-1], tokens[start : start + block_size]))
    return digests[1:]


def filled(manager: BlockManager, digests: list[bytes]) -> list[int]:
    """A table of new blocks, cached under the digests."""
    table = manager.take((), len(digests))
    assert table is not None
    for block, digest in zip(table, digests, strict=True):
        manager.cache(block, digest)
    return table


def test_a_digest_depends_on_every_token_before_and_on_the_cache_key():
    reference = chain(TOKENS, 4)
    assert chain(TOKENS, 4) == reference
    for i in range(len(TOKENS)):
        changed = chain([*TOKENS[:i], 99, *TOKENS[i + 1 :]], 4)
        assert changed[: i // 4] == reference[: i // 4]
        assert not set(changed[i // 4 :]) & set(reference)
    assert not set(chain(TOKENS, 4, b"weights 2")) & set(reference)
    assert not set(chain(TOKENS, 8)) & set(reference)
    assert all(len(digest) == 32 for digest in reference)


def test_a_digest_takes_lists_and_tuples_and_wide_ids():
    assert block_hash(b"p", [1, (1 << 31) - 1]) == block_hash(b"p", (1, (1 << 31) - 1))


def test_blocks_are_lent_until_they_run_out():
    manager = BlockManager(4, 2)
    table = manager.take((), 3)
    assert len(set(table)) == 3
    assert manager.num_free == 1
    assert manager.take((), 2) is None
    assert manager.num_free == 1
    assert manager.take((), 1, reserve=1) is None
    rest = manager.take((), 1)
    assert sorted(table + rest) == [0, 1, 2, 3]
    manager.check_integrity([table, rest])
    manager.free(table)
    assert (manager.num_free, manager.num_freed) == (3, 3)
    manager.check_integrity([rest])


def test_the_longest_cached_prefix_is_shared():
    manager = BlockManager(8, 4)
    digests = chain(TOKENS, 4)
    first = filled(manager, digests[:3])
    hits = manager.match(digests)
    assert hits == first
    second = manager.take(hits, 1)
    assert second[:3] == first
    assert manager.num_free == 4
    manager.check_integrity([first, second])
    manager.free(first)
    assert manager.num_free == 4, "the sharer still holds them"
    manager.free(second)
    assert manager.num_free == 8
    assert manager.match(digests) == first, "nobody holds them, yet they stay"
    assert manager.match(chain([7, *TOKENS[1:]], 4)) == []


def test_idle_hits_count_as_taken():
    manager = BlockManager(4, 4)
    digests = chain(TOKENS, 4)[:3]
    manager.free(filled(manager, digests))
    hits = manager.match(digests)
    assert manager.take(hits, 2) is None
    assert manager.take(hits, 1, reserve=1) is None
    manager.check_integrity([])
    table = manager.take(hits, 1)
    assert table[:3] == hits
    assert manager.num_free == 0
    assert manager.match(digests) == hits, "a new block must not take the place of a hit"


def test_the_least_recently_freed_goes_first_and_a_tail_before_its_head():
    manager = BlockManager(6, 4)
    old, new = chain(TOKENS, 4)[:3], chain(TOKENS[::-1], 4)[:3]
    old_table, new_table = filled(manager, old), filled(manager, new)
    manager.free(old_table)
    manager.free(new_table)
    evicted = []
    for _ in range(6):
        evicted += manager.take((), 1)
        manager.check_integrity([evicted])
    assert evicted == [*reversed(old_table), *reversed(new_table)]
    assert manager.match(old) == manager.match(new) == []


def test_use_renews_a_block():
    manager = BlockManager(2, 4)
    (a,), (b,) = chain(TOKENS[:4], 4), chain(TOKENS[4:8], 4)
    manager.free(filled(manager, [a]))
    manager.free(filled(manager, [b]))
    manager.free(manager.take(manager.match([a]), 0))
    manager.take((), 1)
    assert manager.match([b]) == []
    assert len(manager.match([a])) == 1


def test_what_cannot_be_found_again_is_reused_first():
    manager = BlockManager(3, 4)
    digests = chain(TOKENS, 4)[:2]
    cached = filled(manager, digests)
    private = manager.take((), 1)
    manager.free(cached)
    manager.free(private)
    assert manager.take((), 1) == private
    assert manager.match(digests) == cached


def test_of_two_equal_blocks_the_first_stays_cached():
    manager = BlockManager(4, 4)
    digests = chain(TOKENS, 4)[:1]
    first, second = filled(manager, digests), filled(manager, digests)
    assert manager.match(digests) == first
    assert manager.digest(second[0]) is None
    manager.free(second)
    assert manager.match(digests) == first
    manager.check_integrity([first])


def test_a_forgotten_cache_has_no_hits_but_keeps_its_owners():
    manager = BlockManager(4, 4)
    digests = chain(TOKENS, 4)[:2]
    table = filled(manager, digests)
    manager.forget_cache()
    assert manager.match(digests) == []
    manager.check_integrity([table])
    manager.free(table)
    assert manager.num_free == 4


def test_the_integrity_check_can_fail():
    manager = BlockManager(4, 4)
    table = manager.take((), 2)
    with pytest.raises(AssertionError, match=f"block {table[0]}: 1 references, 0 owners"):
        manager.check_integrity([table[1:]])
    with pytest.raises(AssertionError, match="occurs twice"):
        manager.check_integrity([table + table])
    manager.cache(table[0], chain(TOKENS, 4)[0])
    manager._cached.clear()
    with pytest.raises(AssertionError, match="two directions"):
        manager.check_integrity([table])


@given(st.lists(st.integers(0, 3), max_size=24), st.lists(st.integers(0, 3), max_size=24), st.integers(1, 4))
def test_two_sequences_share_exactly_their_common_full_blocks(left, right, block_size):
    manager = BlockManager(24, block_size)
    filled(manager, chain(left, block_size))
    common = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    assert len(manager.match(chain(right, block_size))) == common // block_size


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences over two letters come and go; the contents of a block must be those of its digest."""

    tables = Bundle("tables")
    NUM_BLOCKS, BLOCK_SIZE = 9, 2

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(self.NUM_BLOCKS, self.BLOCK_SIZE)
        self.live: list[list[int]] = []
        self.contents: dict[int, bytes] = {}

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), max_size=12), reserve=st.integers(0, 2))
    def admit(self, tokens, reserve):
        digests = chain(tokens, self.BLOCK_SIZE)
        hits = self.manager.match(digests)
        assert [self.contents[block] for block in hits] == digests[: len(hits)]
        free = self.manager.num_free
        table = self.manager.take(hits, len(digests) - len(hits), reserve=reserve)
        if table is None:
            assert self.manager.num_free == free
            return []
        assert self.manager.num_free >= reserve or not table
        for block, digest in list(zip(table, digests, strict=True))[len(hits) :]:
            self.contents[block] = digest
            self.manager.cache(block, digest)
        self.live.append(table)
        return table

    @rule(table=consumes(tables))
    def finish(self, table):
        if any(table is other for other in self.live):
            self.live = [other for other in self.live if other is not table]
            self.manager.free(table)

    @rule()
    def lose_everything(self):
        self.manager.forget_cache()

    @invariant()
    def books_agree(self):
        self.manager.check_integrity(self.live)


BlockManagerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestBlockManagerMachine = BlockManagerMachine.TestCase
