"""A group of shards: one Ray actor for each, driven by frames, in a placement that outlives them.

Ray places, starts and kills the actors; no call of Ray's is made for a step. A group is started as often as its shards
are lost: each time in a new epoch, with a new key, so that nothing of an earlier one is ever taken for its own.
"""

import atexit
import contextlib
import secrets
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rayllm_cluster.channel import MAX_FRAME_BYTES
from rayllm_cluster.epoch import Epoch
from rayllm_cluster.errors import GroupClosedError
from rayllm_cluster.handshake import KEY_BYTES, Listener
from rayllm_cluster.interface import LOOPBACK
from rayllm_cluster.placement import PlacementPlan, place
from rayllm_cluster.rendezvous import Backend
from rayllm_cluster.shard import HandlerFactory, ShardSpec

_LOCATE_S = 5.0  # for the bundles of a lost node to be placed anew; `close` has to wait for it


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupOptions:
    """`threads` is the number of torch's threads in each shard."""

    backend: Backend = "gloo"
    threads: int = 1
    placement_timeout_s: float = 60.0
    collective_timeout_s: float = 300.0
    max_frame_bytes: int = MAX_FRAME_BYTES


class ShardGroup:
    """`start` first, and again after each ShardLostError if the shards are to come back. `ready` holds what each rank's
    handler said when it was built, by rank.

    `start`, `broadcast` and `recv` are for one thread; `check` and `close` may be called from any, and `close` ends a
    blocked call. A ShardLostError is raised when every shard is dead, and again by every later call but `start`. Only
    `close` gives the placement back.
    """

    def __init__(
        self,
        factory: str | HandlerFactory,
        config: bytes,
        plan: PlacementPlan,
        options: GroupOptions | None = None,
    ) -> None:
        """Places the shards; `factory` and `config` as in `rayllm_cluster.shard`. Raises PlacementError."""
        self._factory = factory
        self._config = config
        self._options = options or GroupOptions()
        self._changing = threading.Lock()  # the epoch, or whether the group is closed
        self._closed = False
        self._epoch = Epoch(0)
        self.ready: tuple[bytes, ...] = ()
        self._placement = place(plan, timeout_s=self._options.placement_timeout_s)
        atexit.register(self.close)

    def start(self, *, timeout_s: float, config: bytes | None = None) -> None:
        """Returns when every shard is ready, all that it has to load included. `config`: in the place of the one
        before, from now on.

        Raises ShardLostError for a shard that does not get there (`.error` is what its handler raised, if so), or
        PlacementError when a bundle has no node just now.
        """
        deadline = time.monotonic() + timeout_s
        self._config = self._config if config is None else config
        epoch = self._next_epoch()
        self._placement.locate(min(timeout_s, _LOCATE_S))
        key = secrets.token_bytes(KEY_BYTES)
        slots, driver = self._placement.slots, self._placement.driver
        remote = any(slot.node != driver for slot in slots)
        listener = Listener(key=key, epoch=epoch.number, tcp_host=driver.address if remote else None)
        with contextlib.closing(listener):
            specs = self._specs(listener, key, epoch.number)
            self.ready = epoch.start(specs, self._placement, listener, timeout_s=deadline - time.monotonic())

    def broadcast(self, payload: bytes, *, timeout_s: float) -> None:
        """Send to every rank. Blocks only while a shard has not read what was sent before."""
        self._epoch.broadcast(payload, timeout_s=timeout_s)

    def recv(self, rank: int, *, timeout_s: float) -> bytes:
        """The next answer of that rank."""
        return self._epoch.recv(rank, timeout_s=timeout_s)

    def check(self) -> None:
        """Raises ShardLostError when a shard was lost, also while nothing was asked of it, or GroupClosedError."""
        self._epoch.check()

    def close(self) -> None:
        """End every shard and give the placement back, if it is the group's own. Idempotent."""
        with self._changing:
            self._closed = True
        self._epoch.close()
        self._placement.release()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _next_epoch(self) -> Epoch:
        with self._changing:
            if self._closed:
                raise GroupClosedError("the shard group is closed")
            previous, self._epoch = self._epoch, Epoch(self._epoch.number + 1)
        previous.close()
        return self._epoch

    def _specs(self, listener: Listener, key: bytes, epoch: int) -> list[ShardSpec]:
        slots, driver, options = self._placement.slots, self._placement.driver, self._options
        one_node = all(slot.node == slots[0].node for slot in slots)
        return [
            ShardSpec(
                rank=rank,
                world_size=len(slots),
                epoch=epoch,
                factory=self._factory,
                config=self._config,
                driver=listener.address(same_node=slot.node == driver),
                key=key,
                store_host=LOOPBACK if one_node else slots[0].node.address,
                backend=options.backend,
                threads=options.threads,
                collective_timeout_s=options.collective_timeout_s,
                max_frame_bytes=options.max_frame_bytes,
            )
            for rank, slot in enumerate(slots)
        ]
