"""What this replica runs, for itself and for its peers, and what it lets them know of it."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rayllm.core.errors import EngineUnavailableError
from rayllm.serve.replica_state import MAX_KEYS, ExpectedKeys, Keys, Snapshot, prefix_keys
from rayllm.serve.routing import Candidate


class CacheEngine(Protocol):
    """What is asked of `AsyncEngine` here."""

    def cached_blocks(self, digests: Sequence[bytes]) -> int: ...
    def recent_digests(self, limit: int) -> list[bytes]: ...
    def check_health(self) -> None: ...

    @property
    def is_recovering(self) -> bool: ...

    @property
    def weight_version(self) -> str: ...


class Work:
    """A request that runs here. `tokens`: of its prompt, to be computed before its first token."""

    def __init__(self, state: "LocalState", tokens: int) -> None:
        self._state = state
        self._tokens = tokens

    def computed(self) -> None:
        """Its first token is there; after that it does nothing."""
        if self._tokens:
            self._state.queued_tokens -= self._tokens
            self._tokens = 0
            self._state.notify()


class LocalState:
    """For one event loop."""

    def __init__(
        self, engine: CacheEngine, *, block_size: int, max_num_seqs: int, is_draining: Callable[[], bool]
    ) -> None:
        self.queued_tokens = 0
        self.block_size = block_size
        self.expected = ExpectedKeys()
        self._engine = engine
        self._max_num_seqs = max_num_seqs
        self._is_draining = is_draining
        self._sequences = 0
        self._ends = False
        self._changed = asyncio.Event()
        self._snapshot: Snapshot | None = None

    @property
    def is_draining(self) -> bool:
        """Nothing is to be sent here any more."""
        return self._ends or self._is_draining()

    @property
    def is_healthy(self) -> bool:
        try:
            self._engine.check_health()
        except EngineUnavailableError:
            return False
        return True

    @property
    def is_full(self) -> bool:
        """A new sequence would have to wait for others to end, or for the shards."""
        return self._sequences >= self._max_num_seqs or self._engine.is_recovering

    @contextmanager
    def working(self, *, tokens: int, sequences: int) -> Iterator[Work]:
        work = Work(self, tokens)
        self.queued_tokens += tokens
        self._sequences += sequences
        self.notify()
        try:
            yield work
        finally:
            self._sequences -= sequences
            work.computed()
            self.notify()

    def candidate(self, name: str, digests: Sequence[bytes]) -> Candidate:
        """`digests`: of the prompt that asks."""
        blocks = max(self._engine.cached_blocks(digests), self.expected.blocks(prefix_keys(digests)))
        return Candidate(
            name=name,
            cached_tokens=blocks * self.block_size,
            queued_tokens=self.queued_tokens,
            running=self._sequences,
            is_full=self.is_full,
        )

    def end(self) -> None:
        """It drains from now on."""
        self._ends = True
        self.notify()

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change after this was asked for."""
        return self._changed

    def notify(self) -> None:
        self._snapshot = None
        self._changed.set()
        self._changed = asyncio.Event()

    def snapshot(self) -> Snapshot:
        """The same for all who ask between two changes; the cache's keys take a while to gather."""
        version, full = self._engine.weight_version, self.is_full
        draining = self.is_draining or not self.is_healthy
        last = self._snapshot
        if last is None or (last.weight_version, last.is_full, last.is_draining) != (version, full, draining):
            keys: Keys = frozenset(prefix_keys(self._engine.recent_digests(MAX_KEYS)))
            self._snapshot = last = Snapshot(
                weight_version=version,
                queued_tokens=self.queued_tokens,
                running=self._sequences,
                is_full=full,
                is_draining=draining,
                keys=keys,
            )
        return last
