"""Frames of bytes over a connected stream socket.

A frame is a header (payload length u32, epoch u32, kind u8, big-endian) and the payload. The epoch counts the starts of
a group, so that a byte of an earlier life is never taken for one of this. Nothing is unpickled; what the payload means
is not known here. The peer has been authenticated by `rayllm_cluster.handshake`; frames are neither encrypted nor
signed, so a network between nodes has to be one that is trusted.
"""

import socket
import struct
from enum import IntEnum
from typing import NamedTuple

from rayllm_cluster.errors import FrameError, PeerClosedError, PeerUnreachableError

MAX_FRAME_BYTES = 64 << 20
SILENCE_S = 10  # as long as this a network may be broken before the other node counts as gone

_HEADER = struct.Struct("!IIB")
_READ_BYTES = 1 << 16


class FrameKind(IntEnum):
    DATA = 0  # to a shard: for its handler; from a shard: the handler's answer
    PORT = 1  # where rank 0's store listens
    READY = 2  # the handler is built
    ERROR = 3  # the handler failed: an encoded RemoteError
    STOP = 4  # leave the loop


class Frame(NamedTuple):
    kind: FrameKind
    payload: bytes


def encode_frame(
    payload: bytes, *, epoch: int, kind: FrameKind = FrameKind.DATA, limit: int = MAX_FRAME_BYTES
) -> bytes:
    if len(payload) > limit:
        raise FrameError(f"a frame of {len(payload)} bytes, at most {limit} are allowed")
    return _HEADER.pack(len(payload), epoch, kind) + payload


class FrameDecoder:
    """Cuts a stream into frames, however it was cut into reads. A bad header is refused before its payload is kept."""

    def __init__(self, *, epoch: int, limit: int = MAX_FRAME_BYTES) -> None:
        self._epoch = epoch
        self._limit = limit
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """Of a frame that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Frame | None:
        if len(self._buffer) < _HEADER.size:
            return None
        length, epoch, kind = _HEADER.unpack_from(self._buffer)
        if epoch != self._epoch:
            raise FrameError(f"a frame of epoch {epoch} in epoch {self._epoch}")
        if kind > FrameKind.STOP:
            raise FrameError(f"a frame of unknown kind {kind}")
        if length > self._limit:
            raise FrameError(f"a frame of {length} bytes, at most {self._limit} are allowed")
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            payload = bytes(view[_HEADER.size : end])
        del self._buffer[:end]
        return Frame(FrameKind(kind), payload)


class Channel:
    """One end of a connection. `send` and `recv` block; `send_some` and `recv_some` never do, for use with a selector.

    All raise PeerClosedError when the other end is gone, PeerUnreachableError when its node, or the network, has not
    answered for SILENCE_S. Not for two threads at once.
    """

    def __init__(self, connection: socket.socket, *, epoch: int, limit: int = MAX_FRAME_BYTES) -> None:
        self._socket = connection
        self._epoch = epoch
        self._limit = limit
        self._decoder = FrameDecoder(epoch=epoch, limit=limit)
        connection.settimeout(None)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)  # for what was sent

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def encode(self, payload: bytes, kind: FrameKind = FrameKind.DATA) -> bytes:
        return encode_frame(payload, epoch=self._epoch, kind=kind, limit=self._limit)

    def send(self, payload: bytes, kind: FrameKind = FrameKind.DATA) -> None:
        try:
            self._socket.sendall(self.encode(payload, kind))
        except OSError as error:
            raise _gone(error) from error

    def send_some(self, data: memoryview) -> int:
        """How many bytes were taken at once, perhaps none."""
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _gone(error) from error

    def recv(self) -> Frame:
        while (frame := self._decoder.next()) is None:
            self._read(0)
        return frame

    def recv_some(self) -> list[Frame]:
        """The frames that are complete after reading what has arrived."""
        self._read(socket.MSG_DONTWAIT)
        frames = []
        while (frame := self._decoder.next()) is not None:
            frames.append(frame)
        return frames

    def _read(self, flags: int) -> None:
        try:
            data = self._socket.recv(_READ_BYTES, flags)
        except BlockingIOError:
            return
        except OSError as error:
            raise _gone(error) from error
        if not data:
            rest = self._decoder.pending_bytes
            raise PeerClosedError(
                f"the connection ended within a frame, after {rest} bytes" if rest else "the connection is closed"
            )
        self._decoder.feed(data)


def _gone(error: OSError) -> PeerClosedError:
    if isinstance(error, ConnectionError):
        return PeerClosedError("the connection is closed")
    return PeerUnreachableError(str(error.strerror).lower())


def keep_alive(connection: socket.socket) -> None:
    """The kernel asks the other node every second whether it is there; a process that is busy has no part in it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_S)
