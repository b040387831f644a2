"""One life of a group of shards: from its start to its first loss, which ends them all.

A shard that dies (its socket ends, or Ray says so), is stopped (its node says so), fails (its handler raises) or stalls
(no answer in time) takes the others with it, because they wait for it in a collective and cannot be told otherwise.
"""

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

from rayllm_cluster.channel import Channel, FrameKind
from rayllm_cluster.errors import ClusterError, GroupClosedError, ShardLostError, ShardStalledError
from rayllm_cluster.handshake import Listener
from rayllm_cluster.hub import Hub
from rayllm_cluster.members import Members
from rayllm_cluster.placement import Placement
from rayllm_cluster.shard import ShardSpec

logger = logging.getLogger(__name__)

_STOP_S = 2.0  # for the shards to leave their loops when the epoch is closed
_ACCEPT_S = 0.1
# How often the processes are looked at. A stopped one has to be found so twice, hence within three times this.
_WATCH_S = 0.25


class Epoch:
    """`start` once, then `broadcast` and `recv` from one thread at a time; `close` and `check` from any.

    A ShardLostError is raised when every shard is dead, and again by every later call; its `detection_s` is set.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._calling = threading.RLock()  # held while the shards are started, or the hub is in use
        self._called = 0.0  # when the call that uses the hub began
        self._failing = threading.Lock()
        self._lost: ShardLostError | None = None
        self._started = False
        self._closing = threading.Event()
        self._closed = False
        self._members: Members | None = None
        self._hub: Hub | None = None
        self._watcher: threading.Thread | None = None

    def start(
        self, specs: Sequence[ShardSpec], placement: Placement, listener: Listener, *, timeout_s: float
    ) -> tuple[bytes, ...]:
        """Returns when every shard is ready: what each said, by rank. Raises ShardLostError for one that does not get
        there; `.error` is what its handler raised, if so."""
        deadline = time.monotonic() + timeout_s
        with self._calling:
            self.check()
            self._members = Members(specs, placement)
            self._watcher = threading.Thread(
                target=self._watch, args=(self._members,), name="shard-watcher", daemon=True
            )
            self._watcher.start()
            try:
                channels = self._accept(specs, listener, self._members, deadline)
            except ShardLostError as error:
                raise self._fail(error) from None
            self._hub = Hub(channels)
            with self._using_hub() as hub:
                if len(specs) > 1:
                    port = hub.recv(0, kind=FrameKind.PORT, timeout_s=deadline - time.monotonic())
                    for rank in range(1, len(specs)):
                        hub.send(rank, port, kind=FrameKind.PORT, timeout_s=deadline - time.monotonic())
                ready = tuple(
                    hub.recv(rank, kind=FrameKind.READY, timeout_s=deadline - time.monotonic())
                    for rank in range(len(specs))
                )
            self._started = True
            return ready

    def broadcast(self, payload: bytes, *, timeout_s: float) -> None:
        with self._using_hub() as hub:
            hub.broadcast(payload, timeout_s=timeout_s)

    def recv(self, rank: int, *, timeout_s: float) -> bytes:
        with self._using_hub() as hub:
            return hub.recv(rank, timeout_s=timeout_s)

    def check(self) -> None:
        """Raises ShardLostError when a shard was lost, also while nothing was asked of it, or GroupClosedError."""
        if self._lost is not None:
            raise self._lost
        if self._closing.is_set():
            raise GroupClosedError("the shard group is closed")

    def close(self) -> None:
        """End every shard, and a call that is blocked. Idempotent."""
        self._closing.set()
        if self._hub is not None:
            self._hub.wake()
        with self._calling:
            if self._closed:
                return
            if self._members is not None:
                self._stop(self._members)
            if self._hub is not None:
                self._hub.close()
            if self._watcher is not None:
                self._watcher.join(_STOP_S)  # it may wait for ever, if Ray was shut down under it
            self._closed = True

    def _accept(
        self, specs: Sequence[ShardSpec], listener: Listener, members: Members, deadline: float
    ) -> list[Channel]:
        """The channels by rank, once every shard has connected."""
        connections: dict[int, socket.socket] = {}
        with contextlib.ExitStack() as stack:
            while len(connections) < len(specs):
                self.check()
                if time.monotonic() > deadline:
                    rank = next(spec.rank for spec in specs if spec.rank not in connections)
                    raise ShardLostError(rank, "not started in time")
                if (member := listener.accept(_ACCEPT_S)) is None:
                    continue
                rank, connection = member
                stack.callback(connection.close)
                connections[rank] = connection
                if connection.family == socket.AF_UNIX:
                    members.watch_process(rank, _peer_pid(connection))
            stack.pop_all()
        return [Channel(connections[spec.rank], epoch=self.number, limit=spec.max_frame_bytes) for spec in specs]

    def _watch(self, members: Members) -> None:
        """In a thread of its own: what Ray knows first, such as a node that is gone; processes that are stopped; and
        deaths between two steps."""
        while self._lost is None and not self._closing.is_set():
            lost = members.lost(_WATCH_S)
            if lost is not None:
                if not self._closing.is_set():
                    self._fail(lost)
                return

    @contextlib.contextmanager
    def _using_hub(self) -> Iterator[Hub]:
        with self._calling:
            self.check()
            assert self._hub is not None
            self._called = time.monotonic()
            try:
                yield self._hub
            except ShardLostError as error:
                raise self._fail(error) from None
            except GroupClosedError:  # woken: by the watcher, or by close
                self.check()
                raise

    def _fail(self, error: ShardLostError) -> ShardLostError:
        """Kill every shard; returns why, which may have been found out before."""
        with self._failing:
            if self._lost is None:
                assert self._members is not None
                since = self._called if isinstance(error, ShardStalledError) else self._members.seen
                error.detection_s = time.monotonic() - since
                logger.error(
                    "Shards of epoch %d lost: %s (noticed within %.2f s)", self.number, error, error.detection_s
                )
                self._lost = error
                if isinstance(error, ShardStalledError):
                    self._members.dump_stacks()
                self._members.kill()
                if self._hub is not None:
                    self._hub.wake()
        return self._lost

    def _stop(self, members: Members) -> None:
        if self._hub is not None and self._started and self._lost is None:
            with contextlib.suppress(ClusterError):
                self._hub.broadcast(b"", kind=FrameKind.STOP, timeout_s=_STOP_S)
                members.wait_ended(_STOP_S)
        members.kill()


def _peer_pid(connection: socket.socket) -> int:
    pid, _, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)
