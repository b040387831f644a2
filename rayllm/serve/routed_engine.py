"""An engine among others: each request is answered by the replica that is best for it, and by whom nobody can tell.

Has the interface of `AsyncEngine`, so that neither face knows of it. What is sent on is the tokenized request with a
seed and the weights' version, so an answer whose replica is lost goes on here from its tokens, with the right next one.
"""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from rayllm.core.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineUnavailableError,
    RayLLMError,
    RequestAbortedError,
)
from rayllm.core.types import MAX_SEED, Request
from rayllm.engine.async_engine import LATE, AsyncEngine, EngineStats
from rayllm.engine.outputs import OutputDelta
from rayllm.serve.local_state import LocalState
from rayllm.serve.metrics import PEER_FAILURES, ROUTED
from rayllm.serve.peer import ABORT_S, Peer, PeerLostError
from rayllm.serve.peer_messages import MAX_MESSAGE_BYTES
from rayllm.serve.peer_server import PeerServer
from rayllm.serve.peers import Directory, Peers
from rayllm.serve.replica_state import MAX_PROMPT_BLOCKS, prefix_keys
from rayllm.serve.routing import Candidate, decide
from rayllm.serve.service import InferenceService
from rayllm_cluster import streams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Route:
    """`peer` None: here. `cached_tokens`: of the prompt, thought to be in its cache."""

    peer: Peer | None
    cached_tokens: int


class RoutedEngine:
    def __init__(
        self,
        engine: AsyncEngine,
        state: LocalState,
        directory: Directory,
        *,
        name: str,
        key: bytes,
        policy: str,
    ) -> None:
        """`name` of this replica, `key` of all replicas of the endpoint; `policy`: one of `routing.POLICIES`."""
        self.tokenizer = engine.tokenizer
        self.limits = engine.limits
        self._engine = engine
        self._state = state
        self._name = name
        self._key = key
        self._policy = policy
        self._service: InferenceService | None = None
        self._random = random.Random()
        self._peer_server = PeerServer(self._answer_here, self._abort_here, state)
        self._peers = Peers(directory, own_name=name, key=key, lost=self._peer_server.drop)
        self._server: asyncio.Server | None = None
        self._following: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[bool | None]] = set()

    def attach(self, service: InferenceService) -> None:
        """To what clients reach of this replica: it knows their requests by their ids, and counts what happens here."""
        self._service = service

    async def start(self, host: str) -> None:
        """`host`: this node's address as its peers reach it. Before, and without peers, all is answered here."""
        self._server = await streams.serve(
            host, self._peer_server.handle, key=self._key, name=self._name, limit=MAX_MESSAGE_BYTES
        )
        address = self._server.sockets[0].getsockname()[:2]
        await self._peers.join(address)
        self._following = asyncio.create_task(self._peers.follow())

    async def close(self, *, drain_timeout_s: float) -> None:
        """Leave the others, once what they sent is answered or the time is up. The engine goes on."""
        if self._server is None or self._following is None:
            return
        self._state.end()
        try:
            await self._peers.leave()
        except Exception as error:  # noqa: BLE001 - whatever Ray raises; the others will find nobody and clean up
            logger.warning("replica %s could not leave the directory: %r", self._name, error)
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s):
                await self._peer_server.idle()
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        self._server.close()
        self._peer_server.close()

    async def generate(self, request: Request) -> AsyncGenerator[OutputDelta, None]:
        """As `AsyncEngine.generate`."""
        version = self.weight_version if request.weight_version is None else request.weight_version
        route = self._route(request, version)
        rest: Request | None = request
        if route.peer is not None:
            answer = _Answer(_repeatable(request, version))
            try:
                async with aclosing(self._answer_there(route.peer, answer.request, route.cached_tokens)) as deltas:
                    async for delta in deltas:
                        answer.take(delta)
                        yield delta
                return
            except PeerLostError as error:
                self._failed(route.peer, "lost", error)
            except (CapacityError, EngineUnavailableError) as error:
                if answer.has_begun:
                    raise
                self._failed(route.peer, "refused", error)
            rest, route = answer.rest(), _Route(None, 0)
        if rest is not None:
            async with aclosing(self._answer_here(rest, route.cached_tokens)) as deltas:
                async for delta in deltas:
                    yield delta

    def abort(self, request_id: str, message: str | None = None) -> bool:
        """As `AsyncEngine.abort`."""
        error = RequestAbortedError(message or f"request {request_id} was aborted")
        sent_on = any(peer.end(request_id, error) for peer in self._peers.all())
        return sent_on or self._engine.abort(request_id, message)

    async def abort_everywhere(self, request_id: str) -> bool:
        """End the request that its client knows by this id at whichever replicas it came in, and so wherever it runs.
        False: it is live nowhere. Returns when the first of them had it; the others are asked all the same.

        Raises EngineUnavailableError when none says that it had it and one says nothing, after twice `ABORT_S` at most.
        """
        was_live = self._abort_here(request_id)
        elsewhere = self._ask(self._abort_elsewhere(request_id))
        if was_live:
            return True
        if (answer := await elsewhere) is None:
            problem = f"a replica does not say whether it has request {request_id}, and no other one has it"
            raise EngineUnavailableError(problem, retry_after_s=1.0)
        return answer

    @property
    def weight_version(self) -> str:
        return self._engine.weight_version

    def stats(self) -> EngineStats:
        """Of this replica's engine, to which what was sent on does not belong and what came from peers does."""
        return self._engine.stats()

    def check_health(self) -> None:
        self._engine.check_health()

    def _route(self, request: Request, version: str) -> _Route:
        peers = {peer.name: peer for peer in self._peers.known() if _can_answer(peer, version)}
        if not peers:
            return _Route(None, 0)
        digests = self._engine.prompt_digests(request, max_blocks=MAX_PROMPT_BLOCKS)
        keys = prefix_keys(digests)
        candidates = [self._candidate(peer, keys) for peer in peers.values()]
        if self._engine.holds_weights(version) and self._state.is_healthy:
            candidates.append(self._state.candidate(self._name, digests))
        decision = decide(
            candidates,
            local=self._name,
            policy=self._policy,
            prompt_tokens=len(request.prompt_token_ids),
            session=request.session,
            rng=self._random,
        )
        chosen = next(each for each in candidates if each.name == decision.replica)
        peer = peers.get(chosen.name)
        self._expect(peer, request, keys, chosen.cached_tokens)
        if self._service is not None:
            where = "here" if peer is None else "peer"
            self._service.metrics.count(ROUTED, {"reason": decision.reason.value, "target": where})
        return _Route(peer, chosen.cached_tokens)

    def _candidate(self, peer: Peer, keys: Sequence[bytes]) -> Candidate:
        view = peer.view
        assert view is not None
        return Candidate(
            name=peer.name,
            cached_tokens=view.cached_blocks(keys) * self._state.block_size,
            queued_tokens=view.state.queued_tokens + view.sent_tokens,
            running=view.state.running + view.sent_sequences,
            is_full=view.state.is_full,
        )

    def _expect(self, peer: Peer | None, request: Request, keys: Sequence[bytes], cached_tokens: int) -> None:
        if peer is None or peer.view is None:
            self._state.expected.add(keys)
        else:
            tokens = len(request.prompt_token_ids) - cached_tokens
            peer.view.sent(keys, tokens=tokens, sequences=len(request.started))

    async def _answer_here(self, request: Request, cached_tokens: int) -> AsyncGenerator[OutputDelta, None]:
        tokens = len(request.prompt_token_ids) - cached_tokens
        with self._state.working(tokens=tokens, sequences=len(request.started)) as work:
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    work.computed()
                    yield delta

    async def _answer_there(
        self, peer: Peer, request: Request, cached_tokens: int
    ) -> AsyncGenerator[OutputDelta, None]:
        timer = None
        if request.deadline is not None:  # this replica's own, so that it holds whatever the peer does
            late = DeadlineExceededError(LATE)
            delay = request.deadline - time.monotonic()
            timer = asyncio.get_running_loop().call_later(delay, peer.end, request.request_id, late)
        try:
            async with aclosing(peer.run(request, cached_tokens)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            if timer is not None:
                timer.cancel()

    def _abort_here(self, request_id: str) -> bool:
        return self._service is not None and self._service.abort_here(request_id)

    async def _abort_elsewhere(self, request_id: str) -> bool | None:
        """None: nobody says that it was live, and one says nothing."""
        answers: set[bool | None] = set()
        try:
            async with asyncio.timeout(ABORT_S):
                peers = await self._peers.listed()
        except Exception:  # noqa: BLE001 - whatever Ray raises, and its silence
            peers = self._peers.all()
            answers.add(None)
        for answer in asyncio.as_completed([self._ask(peer.abort(request_id)) for peer in peers]):
            answers.add(await answer)
            if True in answers:
                return True
        return None if None in answers else False

    def _ask(self, question: Coroutine[Any, Any, bool | None]) -> "asyncio.Task[bool | None]":
        """A task that is done whether or not somebody waits for it."""
        task = asyncio.create_task(question)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return task

    def _failed(self, peer: Peer, kind: str, error: PeerLostError | RayLLMError) -> None:
        logger.info("replica %s did not answer a request (%s), which goes on here", peer.name, error)
        if self._service is not None:
            self._service.metrics.count(PEER_FAILURES, {"kind": kind})


class _Answer:
    """What has come of a request that was sent on, so that the rest can be made elsewhere."""

    def __init__(self, request: Request) -> None:
        """`request`: as it was sent, `_repeatable`."""
        self.request = request
        self.has_begun = False
        self._has_prompt_logprobs = False
        self._token_ids: list[list[int] | None] = [None] * request.params.n  # None: finished
        for index, token_ids in request.started.items():
            self._token_ids[index] = list(token_ids)

    def take(self, delta: OutputDelta) -> None:
        self.has_begun = True
        self._has_prompt_logprobs |= delta.prompt_logprobs is not None
        known = self._token_ids[delta.index]
        assert known is not None, "a piece of a finished sequence"
        known += delta.token_ids
        if delta.finish_reason is not None:
            self._token_ids[delta.index] = None

    def rest(self) -> Request | None:
        """What is left to be generated; None: nothing."""
        if not self.has_begun:
            return self.request
        if all(each is None for each in self._token_ids):
            return None
        params = self.request.params
        if self._has_prompt_logprobs:
            params = replace(params, prompt_logprobs=None, prompt_logprobs_start=1)
        resume = tuple(None if each is None else tuple(each) for each in self._token_ids)
        return replace(self.request, params=params, resume=resume)


def _can_answer(peer: Peer, version: str) -> bool:
    view = peer.view
    return view is not None and not view.state.is_draining and view.state.weight_version == version


def _repeatable(request: Request, version: str) -> Request:
    """The same request, whoever answers it and however often."""
    params = request.params
    if params.seed is None and params.temperature > 0:
        params = replace(params, seed=secrets.randbelow(MAX_SEED + 1))
    return replace(request, params=params, weight_version=version)
