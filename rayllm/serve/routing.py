"""Which of an endpoint's replicas should answer a request: a function of what is known of each of them.

A replica's prefix cache is worth the prompt tokens that it spares, and its queue costs the tokens that are before one;
both are counted in tokens, so their difference is a score (Preble, Srivatsa et al. 2024, weighs the same two). Where no
prefix tells the replicas apart it is two choices (Mitzenmacher 2001): the proxy's, which is the replica that has the
request, and one at random, the less loaded of the two. Knows neither where the figures come from nor how a request gets
to another replica.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Final

POLICIES: Final = ("prefix", "power-of-two", "none")

RUNNING_TOKENS: Final = 16  # a sequence that runs slows a newcomer down like about so many prompt tokens before it
_MIN_GAIN: Final = 32  # tokens; for less it is not worth sending a request on, or making two replicas of a prefix's one
_SESSION_SLACK: Final = 1024  # tokens that a session waits for, beyond its own prompt's, rather than change its replica


class Reason(StrEnum):
    PREFIX = "prefix"  # it holds the beginning of the prompt
    SESSION = "session"  # the session's replica
    LOAD = "load"  # the less loaded of two
    LOCAL = "local"  # the request is there already, and no other is better


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A replica with the right weights. `cached_tokens`: how much of the prompt it need not compute; `queued_tokens`:
    prompt tokens that it has accepted and not computed; `is_full`: one more sequence would have to wait for a place."""

    name: str
    cached_tokens: int = 0
    queued_tokens: int = 0
    running: int = 0
    is_full: bool = False

    @property
    def load(self) -> int:
        return self.queued_tokens + RUNNING_TOKENS * self.running

    @property
    def score(self) -> int:
        return self.cached_tokens - self.load


@dataclass(frozen=True, slots=True)
class Decision:
    replica: str
    reason: Reason


def decide(
    candidates: Sequence[Candidate],
    *,
    local: str,
    policy: str,
    prompt_tokens: int,
    session: str | None,
    rng: random.Random,
) -> Decision:
    """`local` has the request; it answers where it is the only one that could, and where there is no candidate."""
    if not candidates or policy == "none":
        return Decision(local, Reason.LOCAL)
    # A full replica is passed over while another is not: its queue moves at the speed of whole answers.
    free = [each for each in candidates if not each.is_full] or list(candidates)
    if session is not None:
        owner = max(candidates, key=lambda each: _weight(session, each.name))
        least = min(each.load for each in free)
        if owner in free and owner.load <= least + prompt_tokens + _SESSION_SLACK:
            return Decision(owner.name, Reason.SESSION)
    here = next((each for each in free if each.name == local), None)
    if policy == "prefix":
        best = max(free, key=lambda each: (each.score, each is here))
        if best.cached_tokens >= _MIN_GAIN and (here in (None, best) or best.score >= here.score + _MIN_GAIN):
            return Decision(best.name, Reason.PREFIX)
    return _less_loaded(here, free, rng)


def _less_loaded(here: Candidate | None, free: Sequence[Candidate], rng: random.Random) -> Decision:
    others = [each for each in free if each is not here]
    rivals = rng.sample(others, min(len(others), 1 if here is not None else 2))
    rival = min(rivals, key=lambda each: each.load, default=None)
    if rival is None or (here is not None and here.load < rival.load + _MIN_GAIN):
        assert here is not None
        return Decision(here.name, Reason.LOCAL)
    return Decision(rival.name, Reason.LOAD)


def _weight(session: str, replica: str) -> bytes:
    """Of rendezvous hashing (Thaler and Ravishankar 1998): a replica that comes or goes moves its own sessions only."""
    return blake2b(session.encode() + b"\0" + replica.encode(), digest_size=8).digest()
