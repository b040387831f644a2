"""Frames of bytes between equal members of a group, for asyncio: TCP connections whose both ends prove the group's key.

As in `handshake`, each end sends a random nonce and the HMAC-SHA256 of (role, name, both nonces) under the key, in
messages of a fixed size. Frames (length u32, payload) are neither encrypted nor signed, so a network between nodes has
to be one that is trusted. What a payload means is not known here, and nothing is unpickled.
"""

import asyncio
import hmac
import logging
import secrets
import struct
from collections.abc import Awaitable, Callable

from rayllm_cluster.channel import keep_alive
from rayllm_cluster.errors import FrameError, HandshakeError, PeerClosedError
from rayllm_cluster.handshake import HANDSHAKE_TIMEOUT_S

logger = logging.getLogger(__name__)

MAX_NAME_BYTES = 64

# Many may connect at once; one that finds no room here waits for the system to try again, or for its time to be up.
_BACKLOG = 4096

_NONCE_BYTES = 32
_LENGTH = struct.Struct("!I")
_HELLO = struct.Struct(f"!{MAX_NAME_BYTES}s32s32s")  # name, nonce, proof


class FrameStream:
    """One end of a connection; `name` is the other end's. For one reader and one writer at a time.

    A node that is gone, or a network that forgot the connection, is noticed after `channel.SILENCE_S` by who waits for
    it; a reader that is slow is not taken for that.
    """

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> None:
        self.name = name
        self._reader = reader
        self._writer = writer
        self._limit = limit

    @property
    def is_open(self) -> bool:
        """As far as is known: nobody notices an end that does not say so."""
        return not (self._reader.at_eof() or self._writer.is_closing())

    async def send(self, payload: bytes) -> None:
        """Waits while the other end does not read. Raises PeerClosedError."""
        if len(payload) > self._limit:
            raise FrameError(f"a frame of {len(payload)} bytes, at most {self._limit} are allowed")
        if self._writer.is_closing():  # uvloop, on which Serve runs, raises RuntimeError for a write then
            raise PeerClosedError("the connection is closed")
        try:
            self._writer.write(_LENGTH.pack(len(payload)) + payload)
            await self._writer.drain()
        except OSError:
            raise PeerClosedError("the connection is closed") from None

    async def recv(self) -> bytes:
        """Raises PeerClosedError, FrameError."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > self._limit:
                raise FrameError(f"a frame of {length} bytes, at most {self._limit} are allowed")
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError):
            raise PeerClosedError("the connection is closed") from None

    def close(self) -> None:
        """At once, and whatever was not sent is lost; a `recv` or `send` that waits ends."""
        self._writer.transport.abort()
        self._reader.feed_eof()  # the transport tells the reader one turn of the loop later


async def connect(host: str, port: int, *, key: bytes, name: str, limit: int) -> FrameStream:
    """Raises HandshakeError; within HANDSHAKE_TIMEOUT_S, whatever the other end does."""
    writer = None
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            keep_alive(writer.get_extra_info("socket"))
            its_name = await _introduce(reader, writer, key=key, name=name)
    except BaseException as error:
        if writer is not None:
            writer.transport.abort()
        if isinstance(error, (OSError, TimeoutError, asyncio.IncompleteReadError)):
            raise HandshakeError(f"no connection to {host}:{port}: {error or 'it does not answer'}") from None
        raise
    return FrameStream(its_name, reader, writer, limit)


async def serve(
    host: str, handle: Callable[[FrameStream], Awaitable[None]], *, key: bytes, name: str, limit: int
) -> asyncio.Server:
    """Calls `handle` for each member that connects, on a port of the system's choosing; the connection ends with it.
    A stranger is turned away and logged."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            keep_alive(writer.get_extra_info("socket"))
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                its_name = await _welcome(reader, writer, key=key, name=name)
            await handle(FrameStream(its_name, reader, writer, limit))
        except (HandshakeError, TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            logger.warning("Refused a connection to %s: %s", name, error or "it does not answer")
        except asyncio.CancelledError:  # the loop ends; asyncio would log it as an error of this callback
            pass
        finally:
            writer.transport.abort()

    return await asyncio.start_server(accept, host, 0, backlog=_BACKLOG)


async def _welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, key: bytes, name: str) -> str:
    challenge = secrets.token_bytes(_NONCE_BYTES)
    writer.write(challenge)
    its_name, nonce, proof = _HELLO.unpack(await reader.readexactly(_HELLO.size))
    if not hmac.compare_digest(proof, _proof(key, b"client", its_name, challenge, nonce)):
        raise HandshakeError("it does not know the group's key")
    own = _pad(name)
    writer.write(_HELLO.pack(own, challenge, _proof(key, b"server", own, challenge, nonce)))
    await writer.drain()
    return _unpad(its_name)


async def _introduce(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, key: bytes, name: str) -> str:
    challenge = await reader.readexactly(_NONCE_BYTES)
    nonce, own = secrets.token_bytes(_NONCE_BYTES), _pad(name)
    writer.write(_HELLO.pack(own, nonce, _proof(key, b"client", own, challenge, nonce)))
    its_name, _, proof = _HELLO.unpack(await reader.readexactly(_HELLO.size))
    if not hmac.compare_digest(proof, _proof(key, b"server", its_name, challenge, nonce)):
        raise HandshakeError("the other end does not know the group's key")
    return _unpad(its_name)


def _proof(key: bytes, role: bytes, name: bytes, challenge: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, role + name + challenge + nonce, "sha256")


def _pad(name: str) -> bytes:
    encoded = name.encode()
    if not 0 < len(encoded) <= MAX_NAME_BYTES:
        raise ValueError(f"a member's name has 1 to {MAX_NAME_BYTES} bytes, not {len(encoded)}")
    return encoded.ljust(MAX_NAME_BYTES, b"\0")


def _unpad(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="replace")
