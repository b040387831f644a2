"""The driver's end of a group: the channels to all its shards, read together, so that whichever of them ends is noticed
while another is waited for."""

import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence

from rayllm_cluster.channel import Channel, Frame, FrameKind
from rayllm_cluster.errors import (
    FrameError,
    GroupClosedError,
    PeerClosedError,
    PeerUnreachableError,
    RemoteError,
    ShardLostError,
    ShardStalledError,
)

DIED = "its process died"

_DUE = {FrameKind.DATA: "answer", FrameKind.PORT: "rendezvous", FrameKind.READY: "sign of being ready"}

# How long to look for a death behind an error: a rank that dies makes the others fail in their collectives at once, and
# their complaint may be read first.
_ROOT_CAUSE_S = 0.1


class Hub:
    """`broadcast`, `send` and `recv` raise ShardLostError, after which the hub is of no use, and GroupClosedError once
    another thread has called `wake`. They are for one thread at a time."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        """`channels` in the order of the ranks."""
        self._channels = list(channels)
        self._inbox: list[deque[Frame]] = [deque() for _ in channels]
        self._selector = selectors.DefaultSelector()
        for rank, channel in enumerate(channels):
            self._selector.register(channel, selectors.EVENT_READ, rank)
        self._wake_here, self._wake_there = socket.socketpair()
        self._selector.register(self._wake_here, selectors.EVENT_READ, None)

    def broadcast(self, payload: bytes, *, timeout_s: float, kind: FrameKind = FrameKind.DATA) -> None:
        frame = memoryview(self._channels[0].encode(payload, kind))
        deadline = time.monotonic() + timeout_s
        for rank in range(len(self._channels)):
            self._send(rank, frame, deadline)

    def send(self, rank: int, payload: bytes, *, timeout_s: float, kind: FrameKind = FrameKind.DATA) -> None:
        frame = memoryview(self._channels[rank].encode(payload, kind))
        self._send(rank, frame, time.monotonic() + timeout_s)

    def recv(self, rank: int, *, timeout_s: float, kind: FrameKind = FrameKind.DATA) -> bytes:
        """The next payload of that rank. Raises ShardLostError when it does not come in time, or any rank is lost."""
        inbox = self._inbox[rank]
        deadline = time.monotonic() + timeout_s
        while not inbox:
            if (remaining := deadline - time.monotonic()) <= 0:
                raise ShardStalledError(rank, f"no {_DUE[kind]} within {timeout_s:.3g} s")
            self._read_ready(remaining)
        frame = inbox.popleft()
        if frame.kind is not kind:
            raise ShardLostError(rank, f"sent {frame.kind.name} where {kind.name} was due")
        return frame.payload

    def wake(self) -> None:
        """From any thread: end the blocked call and refuse all later ones."""
        self._wake_there.close()

    def close(self) -> None:
        self._selector.close()
        for channel in self._channels:
            channel.close()
        self._wake_here.close()
        self._wake_there.close()

    def _send(self, rank: int, frame: memoryview, deadline: float) -> None:
        channel = self._channels[rank]
        try:
            sent = channel.send_some(frame)
            if sent < len(frame):
                self._send_rest(rank, frame[sent:], deadline)
        except PeerClosedError as error:
            if not isinstance(error, PeerUnreachableError):
                self._read_ready(0)  # raises what it had to say before it went
            raise _loss(rank, error) from None

    def _send_rest(self, rank: int, frame: memoryview, deadline: float) -> None:
        # Reading goes on meanwhile: a shard whose own answer waits for room would never read, and both would wait.
        channel = self._channels[rank]
        self._selector.modify(channel, selectors.EVENT_READ | selectors.EVENT_WRITE, rank)
        while frame:
            if (remaining := deadline - time.monotonic()) <= 0:
                raise ShardStalledError(rank, "does not read what is sent to it")
            self._read_ready(remaining)
            frame = frame[channel.send_some(frame) :]
        self._selector.modify(channel, selectors.EVENT_READ, rank)

    def _read_ready(self, timeout_s: float) -> None:
        """Wait until something can be read (or sent, where that is asked for), and take in all that has arrived."""
        failures = self._read(timeout_s)
        if not failures:
            return
        deadline = time.monotonic() + _ROOT_CAUSE_S
        while all(failure.error for failure in failures) and (remaining := deadline - time.monotonic()) > 0:
            failures += self._read(remaining)
        raise next((failure for failure in failures if not failure.error), failures[0])

    def _read(self, timeout_s: float) -> list[ShardLostError]:
        failures = []
        for key, events in self._selector.select(timeout_s):
            if key.data is None:
                raise GroupClosedError("the shard group is closed")
            if events & selectors.EVENT_READ and (failure := self._read_rank(key.data)) is not None:
                failures.append(failure)
        return failures

    def _read_rank(self, rank: int) -> ShardLostError | None:
        failure = self._take_in(rank)
        if failure is not None:
            self._selector.unregister(self._channels[rank])  # after an error the end is no news
        return failure

    def _take_in(self, rank: int) -> ShardLostError | None:
        try:
            frames = self._channels[rank].recv_some()
        except PeerClosedError as error:
            return _loss(rank, error)
        except FrameError as error:
            return ShardLostError(rank, str(error))
        for frame in frames:
            if frame.kind is FrameKind.ERROR:
                raised = RemoteError.decode(frame.payload)
                return ShardLostError(rank, str(raised), error=raised)
            self._inbox[rank].append(frame)
        return None


def _loss(rank: int, error: PeerClosedError) -> ShardLostError:
    unreachable = isinstance(error, PeerUnreachableError)
    return ShardLostError(rank, f"its node does not answer: {error}" if unreachable else DIED)
