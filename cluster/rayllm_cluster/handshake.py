"""How a shard connects to its group: AF_UNIX on the driver's node, TCP from another, both ends proving the group's key.

Each end sends a random nonce and the HMAC-SHA256 of (role, rank, epoch, both nonces) under the key. Every message has a
fixed size, so an end that does not know the key makes nobody allocate, wait long or parse. The key travels to the
shards over Ray's own control plane.
"""

import hmac
import logging
import os
import secrets
import select
import shutil
import socket
import struct
import tempfile
import time

from rayllm_cluster.errors import HandshakeError

logger = logging.getLogger(__name__)

Address = str | tuple[str, int]  # the path of a socket, or (host, port)

KEY_BYTES = 32
HANDSHAKE_TIMEOUT_S = 5.0

_NONCE_BYTES = 32
_HELLO = struct.Struct("!II32s32s")  # rank, epoch, nonce, proof


class Listener:
    """Where the shards of one epoch connect. After `close` neither the socket nor its directory exists."""

    def __init__(self, *, key: bytes, epoch: int, tcp_host: str | None = None) -> None:
        """`tcp_host`: the address of this node that other nodes reach; None when no shard is on another node."""
        self._key = key
        self._epoch = epoch
        self._directory = tempfile.mkdtemp(prefix="shards-")  # of mode 0700
        self._path = os.path.join(self._directory, "driver")
        self._sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)]
        try:
            self._sockets[0].setblocking(False)
            self._sockets[0].bind(self._path)
            self._sockets[0].listen()
            if tcp_host is not None:
                self._sockets.append(socket.create_server((tcp_host, 0)))
                self._sockets[1].setblocking(False)
        except OSError:
            self.close()
            raise

    def address(self, *, same_node: bool) -> Address:
        """For a shard on this node, or on another."""
        if same_node:
            return self._path
        host, port = self._sockets[1].getsockname()
        return (host, port)

    def accept(self, timeout_s: float) -> tuple[int, socket.socket] | None:
        """The next member's rank and connection; None when none came. A stranger is turned away and logged."""
        ready, _, _ = select.select(self._sockets, [], [], timeout_s)
        for listening in ready:
            try:
                connection, _ = listening.accept()
            except OSError:  # it is gone again
                continue
            try:
                return welcome(connection, key=self._key, epoch=self._epoch), connection
            except HandshakeError as error:
                logger.warning("Refused a connection to the shard group: %s", error)
                connection.close()
        return None

    def close(self) -> None:
        for each in self._sockets:
            each.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def connect(address: Address, *, key: bytes, rank: int, epoch: int) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(HANDSHAKE_TIMEOUT_S)
        connection.connect(address)
        introduce(connection, key=key, rank=rank, epoch=epoch)
    except OSError as error:
        connection.close()
        raise HandshakeError(f"cannot connect to the driver: {error}") from error
    except HandshakeError:
        connection.close()
        raise
    return connection


def welcome(connection: socket.socket, *, key: bytes, epoch: int) -> int:
    """The driver's half; returns the rank of the member that has connected."""
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    challenge = secrets.token_bytes(_NONCE_BYTES)
    _send(connection, challenge, deadline)
    rank, its_epoch, nonce, proof = _HELLO.unpack(_recv(connection, _HELLO.size, deadline))
    if not hmac.compare_digest(proof, _proof(key, b"shard", rank, its_epoch, challenge, nonce)):
        raise HandshakeError("it does not know the group's key")
    if its_epoch != epoch:
        raise HandshakeError(f"rank {rank} of epoch {its_epoch} in epoch {epoch}")
    _send(connection, _proof(key, b"driver", rank, epoch, challenge, nonce), deadline)
    return int(rank)


def introduce(connection: socket.socket, *, key: bytes, rank: int, epoch: int) -> None:
    """The shard's half."""
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    challenge = _recv(connection, _NONCE_BYTES, deadline)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    _send(connection, _HELLO.pack(rank, epoch, nonce, _proof(key, b"shard", rank, epoch, challenge, nonce)), deadline)
    expected = _proof(key, b"driver", rank, epoch, challenge, nonce)
    if not hmac.compare_digest(_recv(connection, len(expected), deadline), expected):
        raise HandshakeError("the driver does not know the group's key")


def _proof(key: bytes, role: bytes, rank: int, epoch: int, challenge: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, role + struct.pack("!II", rank, epoch) + challenge + nonce, "sha256")


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    try:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        connection.sendall(data)
    except OSError as error:
        raise HandshakeError(f"no handshake: {error}") from error


def _recv(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        try:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            part = connection.recv(size - len(data))
        except OSError as error:
            raise HandshakeError(f"no handshake: {error}") from error
        if not part:
            raise HandshakeError("no handshake: it closed the connection")
        data += part
    return data
