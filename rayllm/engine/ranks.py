"""The life of a model's ranks: a group of shards that is loaded, and loaded again when one of them is lost.

Knows the commands that make a shard ready for steps, and for how long to try. What was lost with the ranks (sequences
and their KV) is the engine's to know.
"""

import logging
import threading
import time

import msgspec

from rayllm.engine.commands import Command, InitCache, Ready
from rayllm.engine.executor import Recovery
from rayllm_cluster.errors import ClusterError, GroupClosedError, SessionError, ShardLostError
from rayllm_cluster.shard_group import ShardGroup

logger = logging.getLogger(__name__)

_START_S = 600.0  # for the first ranks to be loaded: nobody waits for an answer yet
_FIRST_PAUSE_S = 0.5  # before the second attempt, and twice as long before each one after it
_LONGEST_PAUSE_S = 8.0


class Ranks:
    """`num_blocks`: how many KV blocks each rank holds, as many as fit on the one with the least room when they first
    started; 0 before."""

    def __init__(self, group: ShardGroup, *, recovery_timeout_s: float) -> None:
        """`recovery_timeout_s` bounds an outage: from the loss of a rank until new ones have answered a step, however
        many are lost meanwhile."""
        self.num_blocks = 0
        self._group = group
        self._recovery_timeout_s = recovery_timeout_s
        self._outage: float | None = None  # when it began
        self._closing = threading.Event()

    def start(self) -> None:
        """Raises ShardLostError: at once when a rank cannot do what it is told, else when it is lost time and again."""
        try:
            self._load(_START_S)
        except ShardLostError as lost:
            if lost.error is not None:
                raise
            self.restart(lost)

    def restart(self, lost: ShardLostError, config: bytes | None = None) -> Recovery:
        """Returns when new ranks are loaded (`config`: by another one than before), their caches empty.

        Raises the last ClusterError when the outage has lasted too long, and at once GroupClosedError if `close` was
        called or SessionError if Ray has ended.
        """
        noticed = time.monotonic()
        if self._outage is None:
            self._outage = noticed
        give_up = self._outage + self._recovery_timeout_s
        error: ClusterError = lost
        pause = 0.0
        while time.monotonic() + pause < give_up:
            if self._closing.wait(pause):
                raise GroupClosedError("the shard group is closed")
            try:
                self._load(give_up - time.monotonic(), config)
            except (GroupClosedError, SessionError):
                raise
            except ClusterError as again:
                error = again
                pause = min(2 * pause, _LONGEST_PAUSE_S) or _FIRST_PAUSE_S
                logger.warning("New shards did not start: %s (%.0f s left)", again, give_up - time.monotonic())
            else:
                recovery_s = time.monotonic() - noticed
                logger.warning("New shards are ready %.1f s after the loss of %s", recovery_s, lost)
                return Recovery(cause=str(lost), detection_s=lost.detection_s, recovery_s=recovery_s)
        raise error

    def answered(self) -> None:
        """A step was, so that the outage is over."""
        self._outage = None

    def close(self) -> None:
        """From any thread; ends a `restart`."""
        self._closing.set()
        self._group.close()

    def _load(self, timeout_s: float, config: bytes | None = None) -> None:
        deadline = time.monotonic() + timeout_s
        self._group.start(timeout_s=timeout_s, config=config)
        if not self.num_blocks:
            self.num_blocks = min(msgspec.msgpack.decode(ready, type=Ready).num_blocks for ready in self._group.ready)
        command: Command = InitCache(self.num_blocks)
        self._group.broadcast(msgspec.msgpack.encode(command), timeout_s=deadline - time.monotonic())
        for rank in range(len(self._group.ready)):
            self._group.recv(rank, timeout_s=deadline - time.monotonic())
