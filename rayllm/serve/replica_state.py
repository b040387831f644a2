"""What a replica lets its peers know of itself, and what they make of it.

The prefix cache is told as keys of its blocks, the first eight bytes of their digests, at most MAX_KEYS of them; after
the first time only what has changed. A digest stands for all the tokens up to its block's end and for the weights, so
that equal keys are equal prefixes in any process. Two prefixes of one key would send a request to the wrong replica,
which then finds by the whole digest that it has to compute the prompt.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

MAX_KEYS: Final = 4096
MAX_PROMPT_BLOCKS: Final = 1024  # of a prompt, looked up; what lies beyond makes no difference worth its time
KEY_BYTES: Final = 8
SILENCE_S: Final = 5.0  # a replica that says nothing for so long is lost
_EXPECTED_S: Final = 10.0  # for a prompt to be computed, and for its replica to say so

Keys = frozenset[bytes]


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="state"):
    """`added`, `removed`: keys, one after the other, since the state before on the same connection."""

    weight_version: str
    queued_tokens: int
    running: int
    is_full: bool
    is_draining: bool
    added: bytes
    removed: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A replica's state as it is, from which each peer is told what it does not know yet."""

    weight_version: str
    queued_tokens: int
    running: int
    is_full: bool
    is_draining: bool
    keys: Keys = frozenset()

    def since(self, told: Keys) -> ReplicaState:
        return ReplicaState(
            weight_version=self.weight_version,
            queued_tokens=self.queued_tokens,
            running=self.running,
            is_full=self.is_full,
            is_draining=self.is_draining,
            added=b"".join(self.keys - told),
            removed=b"".join(told - self.keys),
        )


def prefix_keys(digests: Sequence[bytes]) -> list[bytes]:
    return [digest[:KEY_BYTES] for digest in digests]


@dataclass(kw_only=True, slots=True)
class ReplicaView:
    """A peer as this replica knows it: what it said last, and what it was sent since and will say sooner or later."""

    state: ReplicaState
    keys: set[bytes] = field(default_factory=set)
    sent_tokens: int = 0
    sent_sequences: int = 0
    expected: "ExpectedKeys" = field(default_factory=lambda: ExpectedKeys())

    @classmethod
    def of(cls, first: ReplicaState) -> "ReplicaView":
        view = cls(state=first)
        view.take(first)
        return view

    def take(self, state: ReplicaState) -> None:
        """Raises ValueError for more keys than a replica may tell of."""
        self.keys.difference_update(_cut(state.removed))
        self.keys.update(_cut(state.added))
        if len(self.keys) > MAX_KEYS:
            raise ValueError(f"a replica tells of {len(self.keys)} blocks, at most {MAX_KEYS} are allowed")
        self.state = state
        self.sent_tokens = self.sent_sequences = 0

    def sent(self, keys: Sequence[bytes], *, tokens: int, sequences: int) -> None:
        """A request was sent there, with so many tokens to compute."""
        self.sent_tokens += tokens
        self.sent_sequences += sequences
        self.expected.add(keys)

    def cached_blocks(self, keys: Sequence[bytes]) -> int:
        """Of a prompt with these keys. The last block that is known tells: those before it go from a cache after it."""
        return max(_deepest(keys, self.keys), self.expected.blocks(keys))


class ExpectedKeys:
    """What a replica's cache will hold soon, for a while and at most MAX_KEYS of them."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}  # the soonest first

    def add(self, keys: Sequence[bytes]) -> None:
        until = time.monotonic() + _EXPECTED_S
        for key in keys:
            self._until.pop(key, None)
            self._until[key] = until
        while len(self._until) > MAX_KEYS:
            del self._until[next(iter(self._until))]

    def blocks(self, keys: Sequence[bytes]) -> int:
        now = time.monotonic()
        while self._until and next(iter(self._until.values())) <= now:
            del self._until[next(iter(self._until))]
        return _deepest(keys, self._until.keys())


def _deepest(keys: Sequence[bytes], known: Collection[bytes]) -> int:
    if not known:
        return 0
    return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in known), 0)


def _cut(joined: bytes) -> list[bytes]:
    if len(joined) % KEY_BYTES:
        raise ValueError(f"{len(joined)} bytes are no whole number of keys")
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]
