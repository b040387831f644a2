"""A group of shards: one Ray actor for each, driven by frames.

Ray places, starts and kills the actors; no call of Ray's is made for a step. A shard that dies (its socket ends, or
Ray says so), fails (its handler raises) or stalls (no answer in time) ends the whole group, because its peers wait for
it in a collective and cannot be told otherwise.
"""

import atexit
import contextlib
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rayllm_cluster.channel import MAX_FRAME_BYTES, Channel, FrameKind
from rayllm_cluster.errors import ClusterError, GroupClosedError, ShardLostError, ShardStalledError
from rayllm_cluster.handshake import KEY_BYTES, Listener
from rayllm_cluster.hub import Hub
from rayllm_cluster.members import Members
from rayllm_cluster.placement import PlacementPlan, place
from rayllm_cluster.rendezvous import LOOPBACK, Backend
from rayllm_cluster.shard import HandlerFactory, ShardSpec

logger = logging.getLogger(__name__)

_STOP_S = 2.0  # for the shards to leave their loops when the group is closed
_ACCEPT_S = 0.1
_WATCH_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupOptions:
    """`threads` is the number of torch's threads in each shard.

    `start_timeout_s` is for all that happens from the placement to the last shard being ready: it includes loading.
    """

    backend: Backend = "gloo"
    threads: int = 1
    placement_timeout_s: float = 60.0
    start_timeout_s: float = 600.0
    collective_timeout_s: float = 300.0
    max_frame_bytes: int = MAX_FRAME_BYTES


class ShardGroup:
    """`ready` holds what each rank's handler said when it was built, by rank.

    `broadcast` and `recv` are for one thread; `close` may be called from any, and ends a blocked call. A ShardLostError
    is raised when every shard is dead, and again by every later call. Only `close` gives the placement back.
    """

    def __init__(
        self,
        factory: str | HandlerFactory,
        config: bytes,
        plan: PlacementPlan,
        options: GroupOptions | None = None,
    ) -> None:
        """Returns when every shard is ready; `factory` and `config` as in `rayllm_cluster.shard`.

        Raises PlacementError, or ShardLostError for a shard that does not start: `.error` is what its handler raised.
        """
        self._factory = factory
        self._config = config
        self._options = options or GroupOptions()
        self._epoch = 0
        self._calling = threading.Lock()  # held while the hub is in use
        self._failing = threading.Lock()
        self._lost: ShardLostError | None = None
        self._closing = threading.Event()
        self._closed = False
        self._members: Members | None = None
        self._hub: Hub | None = None
        self._watcher: threading.Thread | None = None
        self._placement = place(plan, timeout_s=self._options.placement_timeout_s)
        atexit.register(self.close)
        try:
            self.ready = self._start()
        except BaseException:
            self.close()
            raise

    def broadcast(self, payload: bytes, *, timeout_s: float) -> None:
        """Send to every rank. Blocks only while a shard has not read what was sent before."""
        with self._using_hub() as hub:
            hub.broadcast(payload, timeout_s=timeout_s)

    def recv(self, rank: int, *, timeout_s: float) -> bytes:
        """The next answer of that rank."""
        with self._using_hub() as hub:
            return hub.recv(rank, timeout_s=timeout_s)

    def close(self) -> None:
        """End every shard and give the placement back, if it is the group's own. Idempotent."""
        self._closing.set()
        if self._hub is not None:
            self._hub.wake()
        with self._calling:
            if self._closed:
                return
            self._stop_members()
            if self._hub is not None:
                self._hub.close()
            if self._watcher is not None:
                self._watcher.join(_STOP_S)  # it may wait for ever, if Ray was shut down under it
            self._placement.release()
            self._closed = True
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> tuple[bytes, ...]:
        deadline = time.monotonic() + self._options.start_timeout_s
        slots, driver = self._placement.slots, self._placement.driver
        key = secrets.token_bytes(KEY_BYTES)
        remote = any(slot.node != driver for slot in slots)
        listener = Listener(key=key, epoch=self._epoch, tcp_host=driver.address if remote else None)
        try:
            self._members = Members(self._specs(listener, key), self._placement)
            self._watcher = threading.Thread(
                target=self._watch, args=(self._members,), name="shard-watcher", daemon=True
            )
            self._watcher.start()
            self._hub = Hub(self._accept(listener, self._members, deadline))
        finally:
            listener.close()
        with self._using_hub() as hub:
            if len(slots) > 1:
                port = hub.recv(0, kind=FrameKind.PORT, timeout_s=deadline - time.monotonic())
                for rank in range(1, len(slots)):
                    hub.send(rank, port, kind=FrameKind.PORT, timeout_s=deadline - time.monotonic())
            return tuple(
                hub.recv(rank, kind=FrameKind.READY, timeout_s=deadline - time.monotonic())
                for rank in range(len(slots))
            )

    def _specs(self, listener: Listener, key: bytes) -> list[ShardSpec]:
        slots, driver, options = self._placement.slots, self._placement.driver, self._options
        one_node = all(slot.node == slots[0].node for slot in slots)
        return [
            ShardSpec(
                rank=rank,
                world_size=len(slots),
                epoch=self._epoch,
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

    def _accept(self, listener: Listener, members: Members, deadline: float) -> list[Channel]:
        """The channels by rank, once every shard has connected."""
        num_shards = len(self._placement.slots)
        connections: dict[int, socket.socket] = {}
        with contextlib.ExitStack() as stack:
            while len(connections) < num_shards:
                self._check()
                if time.monotonic() > deadline:
                    rank = next(rank for rank in range(num_shards) if rank not in connections)
                    raise ShardLostError(rank, f"not started within {self._options.start_timeout_s:g} s")
                if (member := listener.accept(_ACCEPT_S)) is None:
                    continue
                rank, connection = member
                stack.callback(connection.close)
                connections[rank] = connection
                if connection.family == socket.AF_UNIX:
                    members.watch_process(_peer_pid(connection))
            stack.pop_all()
        limit = self._options.max_frame_bytes
        return [Channel(connections[rank], epoch=self._epoch, limit=limit) for rank in range(num_shards)]

    def _watch(self, members: Members) -> None:
        """In a thread of its own: what Ray knows first, such as a node that is gone, and deaths between two steps."""
        while not self._closing.is_set():
            lost = members.lost(_WATCH_S)
            if lost is not None:
                if not self._closing.is_set():
                    self._fail(lost)
                return

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost
        if self._closing.is_set():
            raise GroupClosedError("the shard group is closed")

    @contextlib.contextmanager
    def _using_hub(self) -> Iterator[Hub]:
        with self._calling:
            self._check()
            assert self._hub is not None
            try:
                yield self._hub
            except ShardLostError as error:
                raise self._fail(error) from None
            except GroupClosedError:  # woken: by the watcher, or by close
                self._check()
                raise

    def _fail(self, error: ShardLostError) -> ShardLostError:
        """Kill the group; returns why, which may have been found out before."""
        with self._failing:
            if self._lost is None:
                logger.error("Shard group lost: %s", error)
                self._lost = error
                assert self._members is not None
                if isinstance(error, ShardStalledError):
                    self._members.dump_stacks()
                self._members.kill()
                if self._hub is not None:
                    self._hub.wake()
        return self._lost

    def _stop_members(self) -> None:
        if self._members is None:
            return
        if self._hub is not None and self._lost is None:
            with contextlib.suppress(ClusterError):
                self._hub.broadcast(b"", kind=FrameKind.STOP, timeout_s=_STOP_S)
                self._members.wait_ended(_STOP_S)
        self._members.kill()


def _peer_pid(connection: socket.socket) -> int:
    pid, _, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)
