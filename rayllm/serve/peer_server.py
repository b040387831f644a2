"""This replica's side towards its peers: tells them its state, and answers what they send on.

A request that comes by here is run here, whatever its router thinks: it is never sent on again.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from itertools import count
from typing import Final

import msgspec

from rayllm.core.errors import EngineUnavailableError, InvalidRequestError, RayLLMError
from rayllm.core.types import Request
from rayllm.engine.outputs import OutputDelta
from rayllm.serve.local_state import LocalState
from rayllm.serve.peer_messages import Abort, Aborted, Done, Failed, Piece, Question, Run, decode_question, encode
from rayllm.serve.replica_state import Keys
from rayllm_cluster.errors import FrameError, PeerClosedError
from rayllm_cluster.streams import FrameStream

logger = logging.getLogger(__name__)

HEARTBEAT_S: Final = 1.0  # a state is told again after so long, changed or not
_MIN_INTERVAL_S: Final = 0.1  # and not more often than this, however fast it changes

Answer = Callable[[Request, int], AsyncGenerator[OutputDelta, None]]


class PeerServer:
    def __init__(self, answer: Answer, abort: Callable[[str], bool], state: LocalState) -> None:
        """`answer`: runs a request here, of whose prompt so many tokens are thought to be in the cache. `abort`: ends a
        request that came in here, and says whether it was live."""
        self._answer = answer
        self._abort = abort
        self._state = state
        self._streams: dict[str, set[FrameStream]] = defaultdict(set)  # by peer
        self._serial = count()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def handle(self, stream: FrameStream) -> None:
        """One connection, until it ends. It carries one question after another."""
        self._streams[stream.name].add(stream)
        coming = asyncio.create_task(stream.recv())
        try:
            while True:
                question = decode_question(await coming)
                coming = asyncio.create_task(stream.recv())
                await _while_nothing_comes(coming, self._work(stream, question))
        except PeerClosedError:
            return
        except (FrameError, msgspec.DecodeError, InvalidRequestError) as error:
            logger.warning("a connection of replica %s is closed: %s", stream.name, error)
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            self._streams[stream.name].discard(stream)
            if not self._streams[stream.name]:
                del self._streams[stream.name]

    def drop(self, peer: str) -> None:
        """It is lost, so nobody reads the answers to what it sent: they end, and their blocks are free."""
        for stream in list(self._streams.pop(peer, ())):
            stream.close()

    def close(self) -> None:
        for peer in list(self._streams):
            self.drop(peer)

    async def idle(self) -> None:
        """Returns when nothing runs for a peer."""
        await self._idle.wait()

    async def _work(self, stream: FrameStream, question: Question) -> None:
        match question:
            case Run():
                await self._run(stream, question)
            case Abort(request_id):
                await stream.send(encode(Aborted(self._abort(request_id))))
            case _:
                await self._tell(stream)

    async def _tell(self, stream: FrameStream) -> None:
        told: Keys = frozenset()
        while True:
            changed, snapshot = self._state.changed, self._state.snapshot()
            await stream.send(encode(snapshot.since(told)))
            told = snapshot.keys
            await asyncio.sleep(_MIN_INTERVAL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S - _MIN_INTERVAL_S):
                    await changed.wait()

    async def _run(self, stream: FrameStream, run: Run) -> None:
        self._running += 1
        self._idle.clear()
        try:
            # Ids are this engine's and must not meet, whichever replica made them.
            request = run.request_as(f"{stream.name}/{run.request.request_id}/{next(self._serial)}")
            await stream.send(encode(await self._sent(stream, request, run.cached_tokens)))
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _sent(self, stream: FrameStream, request: Request, cached_tokens: int) -> Done | Failed:
        """Sends the pieces; how it ended."""
        try:
            if self._state.is_draining:
                raise EngineUnavailableError("the replica is shutting down")
            async with aclosing(self._answer(request, cached_tokens)) as deltas:
                async for delta in deltas:
                    await stream.send(encode(Piece(delta)))
            return Done()
        except RayLLMError as error:
            return Failed.of(error)
        except (PeerClosedError, FrameError):  # FrameError: a piece too large to be sent; the asker has no such limit
            raise
        except Exception:
            logger.exception("a request of replica %s failed on an internal error", stream.name)
            return Failed(RayLLMError.code, "the server failed on an internal error")


async def _while_nothing_comes(coming: asyncio.Task[bytes], work: "asyncio._CoroutineLike[None]") -> None:
    """Do the work; give it up when the connection ends, which is how a peer cancels. Raises what either raises."""
    working = asyncio.create_task(work)
    try:
        await asyncio.wait((working, coming), return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and coming.exception() is not None:
            return
        await working  # a peer asks on only once it has the whole answer
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
