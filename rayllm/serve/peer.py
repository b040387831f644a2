"""Another replica as seen from here: what it says of itself, and requests that are sent on to it.

A connection carries one request at a time and is kept for the next one; closing it cancels. One more connection tells
the peer's state: when that ends, or nothing comes by it for SILENCE_S, the peer is lost with all that was sent to it,
whether its process has died or stands still.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from rayllm.core.errors import RayLLMError
from rayllm.core.types import Request
from rayllm.engine.outputs import OutputDelta
from rayllm.serve.peer_messages import (
    MAX_MESSAGE_BYTES,
    Abort,
    Failed,
    Piece,
    Run,
    Watch,
    decode_aborted,
    decode_answer,
    decode_state,
    encode,
)
from rayllm.serve.replica_state import SILENCE_S, ReplicaView
from rayllm_cluster.errors import FrameError, HandshakeError, PeerClosedError
from rayllm_cluster.streams import FrameStream, connect

logger = logging.getLogger(__name__)

ABORT_S: Final = 2.0  # for a peer to say whether it has aborted a request
_AGAIN_S: Final = 1.0  # after a connection was lost or refused
_MAX_IDLE: Final = 64  # connections that are kept

Address = tuple[str, int]


class PeerLostError(Exception):
    """The peer is gone, or says nothing; what it would have answered is unknown."""


@dataclass(eq=False, slots=True)
class _Sent:
    """A request that was sent on. `end` makes its reader raise the error, wherever it is."""

    connecting: "asyncio.Task[FrameStream]"
    error: Exception | None = None

    @property
    def stream(self) -> FrameStream | None:
        task = self.connecting
        return task.result() if task.done() and not task.cancelled() and task.exception() is None else None

    def end(self, error: Exception) -> None:
        self.error = self.error or error
        self.close()

    def close(self) -> None:
        self.connecting.cancel()
        if self.stream is not None:
            self.stream.close()


class Peer:
    def __init__(self, name: str, address: Address, *, own_name: str, key: bytes, lost: Callable[[str], None]) -> None:
        """`lost`: told of the peer's name each time that it is."""
        self.name = name
        self.address = address
        self.view: ReplicaView | None = None  # None: nothing is known of it now
        self._own_name = own_name
        self._key = key
        self._lost = lost
        self._is_missed = False
        self._idle: list[FrameStream] = []
        self._sent: dict[str, _Sent] = {}

    async def watch(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                try:
                    await self._watch()
                except PeerClosedError as error:
                    # What was sent to it has connections of its own, which may still hold the rest of an answer.
                    self._forget(error)
                except (HandshakeError, FrameError, TimeoutError, msgspec.DecodeError, ValueError) as error:
                    self._forget(error)
                    self._end_all()
                await asyncio.sleep(_AGAIN_S)
        finally:
            self._end_all()

    async def run(self, request: Request, cached_tokens: int) -> AsyncGenerator[OutputDelta, None]:
        """The peer's answer, as `AsyncEngine.generate` gives it; closing it cancels it there.

        Raises the peer's own errors, the error that `end` was given, or PeerLostError.
        """
        sent = _Sent(asyncio.create_task(self._stream()))
        self._sent[request.request_id] = sent
        is_clean = False
        try:
            await asyncio.wait((sent.connecting,))
            if sent.error is not None:
                raise sent.error
            stream = sent.connecting.result()
            await stream.send(encode(Run.of(request, cached_tokens)))
            while True:
                reply = decode_answer(await stream.recv())
                if sent.error is not None:
                    raise sent.error
                if isinstance(reply, Piece):
                    yield reply.delta
                    continue
                is_clean = True
                if isinstance(reply, Failed):
                    raise reply.error()
                return
        except (HandshakeError, PeerClosedError, FrameError, msgspec.DecodeError) as error:
            raise sent.error or PeerLostError(str(error)) from None
        finally:
            del self._sent[request.request_id]
            if is_clean:
                self._put_back(sent.connecting.result())
            else:
                sent.close()

    def end(self, request_id: str, error: RayLLMError) -> bool:
        """False: no such request was sent there, or it is answered."""
        sent = self._sent.get(request_id)
        if sent is None or sent.error is not None:
            return False
        sent.end(error)
        return True

    async def abort(self, request_id: str) -> bool | None:
        """Ends the request that its client knows by this id, if it came in there: whether it was live. None: the peer
        does not say so within ABORT_S."""
        stream = None
        try:
            async with asyncio.timeout(ABORT_S):
                stream = await self._stream()
                await stream.send(encode(Abort(request_id)))
                reply = decode_aborted(await stream.recv())
        except (HandshakeError, PeerClosedError, FrameError, TimeoutError, msgspec.DecodeError):
            if stream is not None:
                stream.close()
            return None
        self._put_back(stream)
        return reply.was_live

    async def _watch(self) -> None:
        stream = await self._connect()
        try:
            await stream.send(encode(Watch()))
            while True:
                async with asyncio.timeout(SILENCE_S):
                    state = decode_state(await stream.recv())
                if self.view is None:
                    self.view = ReplicaView.of(state)
                    self._is_missed = False
                else:
                    self.view.take(state)
        finally:
            stream.close()

    def _forget(self, error: Exception) -> None:
        """Nothing more is sent to it until it speaks again. Logged once, not at every try to reach it."""
        view, self.view = self.view, None
        if not self._is_missed:
            self._is_missed = True
            level = logging.DEBUG if view is not None and view.state.is_draining else logging.WARNING
            what = "lost" if view is not None else "not reached"
            logger.log(level, "replica %s is %s: %s", self.name, what, str(error) or "it says nothing")
        if view is not None:
            self._lost(self.name)

    def _end_all(self) -> None:
        for sent in list(self._sent.values()):
            sent.end(PeerLostError("it does not answer any more"))
        for stream in self._idle:
            stream.close()
        self._idle.clear()

    async def _stream(self) -> FrameStream:
        while self._idle:
            stream = self._idle.pop()
            if stream.is_open:
                return stream
        return await self._connect()

    async def _connect(self) -> FrameStream:
        host, port = self.address
        stream = await connect(host, port, key=self._key, name=self._own_name, limit=MAX_MESSAGE_BYTES)
        if stream.name != self.name:  # a port is given to another once its replica is gone
            stream.close()
            raise HandshakeError(f"{host}:{port} is replica {stream.name}")
        return stream

    def _put_back(self, stream: FrameStream) -> None:
        if self.view is not None and len(self._idle) < _MAX_IDLE:
            self._idle.append(stream)
        else:
            stream.close()
