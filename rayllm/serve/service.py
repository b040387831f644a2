"""One path from a request to its answer, whichever face it came by: HTTP and gRPC only translate.

Knows neither protocol. Raises the errors of `rayllm.core.errors`; whoever leaves a generation early closes it, and that
aborts it in the engine.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Protocol

from rayllm.core.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    RayLLMError,
    RequestExistsError,
)
from rayllm.core.limits import ModelLimits
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import Request, SamplingParams, check_utf8
from rayllm.engine.async_engine import EngineStats
from rayllm.engine.outputs import OutputDelta
from rayllm.serve.metrics import DURATION, INTER_TOKEN, QUEUE, TIME_TO_FIRST_TOKEN, Metrics
from rayllm.serve.prompts import Prompt, PromptEncoder
from rayllm.serve.recent_ttft import RecentTtft
from rayllm.serve.tracing import Span, generation_span

DEFAULT_MAX_TOKENS = 16  # of a text or token prompt; a chat goes on to the end of its context
MAX_PROMPTS = 128
MAX_SESSION_CHARS = 256
MAX_TIMEOUT_MS = 24 * 3600 * 1000

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")


class Engine(Protocol):
    """What serving needs of `AsyncEngine`."""

    tokenizer: Tokenizer
    limits: ModelLimits

    def generate(self, request: Request) -> AsyncGenerator[OutputDelta, None]: ...
    def abort(self, request_id: str, message: str | None = None) -> bool: ...
    def stats(self) -> EngineStats: ...
    def check_health(self) -> None: ...

    @property
    def weight_version(self) -> str: ...


def checked_session(field: str, session: str) -> str:
    """Raises InvalidRequestError that names `field`, which the session came by."""
    if not 1 <= len(session) <= MAX_SESSION_CHARS:
        raise InvalidRequestError(field, f"must have 1 to {MAX_SESSION_CHARS} characters")
    check_utf8(field, session)
    return session


def new_request_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumption:
    """What a client has of an answer: the weights that gave it, and for each sequence its tokens; None: finished.
    `num_tokens`: all of them, those of the finished ones too."""

    weight_version: str
    token_ids: tuple[tuple[int, ...] | None, ...]
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """What either face parses a request into. `timeout_ms` None: as long as the server allows.

    `attempt`: how often the call was made before under this id; a higher one takes the place of a lower one.
    `session`: calls that share it go to one replica while that is not overloaded.
    """

    face: str  # "http" or "grpc", for the metrics
    model: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    request_id: str
    timeout_ms: int | None = None
    attempt: int = 0
    resume: Resumption | None = None
    session: str | None = None


@dataclass(kw_only=True, slots=True)
class Usage:
    """Of the whole answer, what it was resumed from included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(kw_only=True, slots=True)
class Generation:
    """A call that was found valid. `usage` is complete once the deltas are; `weight_version`, the weights that answer,
    is known once they begin."""

    call: GenerateCall
    created: int  # seconds since 1970
    arrival: float  # monotonic seconds
    requests: tuple[Request, ...]  # one for each prompt
    usage: Usage = field(default_factory=Usage)
    weight_version: str = ""

    @property
    def request_id(self) -> str:
        return self.call.request_id

    @property
    def engine_id(self) -> str:
        """Of this attempt alone."""
        return self.requests[0].request_id


class InferenceService:
    """`model` is the name clients use. `max_request_s` bounds how long any
    request may take: the last resort against one whose client is gone without the server hearing of it. `replica` tells
    this replica from others in the metrics. `abort_everywhere` does what `abort` says; without it there are no
    other replicas."""

    def __init__(
        self,
        engine: Engine,
        *,
        model: str,
        max_request_s: float,
        replica: str | None = None,
        abort_everywhere: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        self.model = model
        self.started = int(time.time())
        self.tokenizer = engine.tokenizer
        self.limits = engine.limits
        self.prompts = PromptEncoder(engine.tokenizer, engine.limits)
        self.metrics = Metrics(engine.stats, lambda: engine.weight_version, replica=replica)
        self.recent_ttft = RecentTtft()
        self._engine = engine
        self._max_request_s = max_request_s
        self._abort_everywhere = abort_everywhere
        self._live: dict[str, Generation] = {}
        self._serial = count()

    @property
    def weight_version(self) -> str:
        """The weights that answer a new request."""
        return self._engine.weight_version

    def check_model(self, model: str) -> None:
        if model != self.model:
            raise ModelNotFoundError(f"model {model[:200]!r} is not served here; this server has {self.model!r}")

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check_health(self) -> None:
        """Raises EngineUnavailableError when the engine makes no progress."""
        self._engine.check_health()

    async def prepare(self, call: GenerateCall) -> Generation:
        """Check and tokenize; nothing is allocated or queued yet. A refusal is counted like any other outcome."""
        arrival = time.monotonic()
        try:
            self.check_model(call.model)
            if not _REQUEST_ID.fullmatch(call.request_id):
                raise InvalidRequestError("request_id", "must be 1 to 128 letters, digits or ._:@/-")
            deadline = arrival + self._timeout_s(call.timeout_ms)
            if not 1 <= len(call.prompts) <= MAX_PROMPTS:
                raise InvalidRequestError("prompt", f"{len(call.prompts)} prompts; 1 to {MAX_PROMPTS} are allowed")
            token_ids = [await self.prompts.encode(prompt, call.params) for prompt in call.prompts]
            requests = tuple(
                Request(
                    # The engine never sees an id twice: an answer of its last holder may still be under way.
                    request_id=f"{call.request_id}#{next(self._serial)}",
                    prompt_token_ids=ids,
                    params=call.params,
                    deadline=deadline,
                    resume=() if call.resume is None else call.resume.token_ids,
                    session=call.session,
                )
                for ids in token_ids
            )
            for request in requests:
                self.limits.check_resume(request)
        except RayLLMError as error:
            self.metrics.ended(call.face, error.code)
            raise
        return Generation(call=call, created=int(time.time()), arrival=arrival, requests=requests)

    async def run(self, generation: Generation) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        """(prompt index, delta) as they come. Closing it aborts what is left; the blocks are free at once.

        Raises RequestExistsError if the id is live, unless this is a later attempt of it, which ends the earlier one;
        EngineUnavailableError if it is to be gone on with by weights that are not here.
        """
        self._take_id(generation)
        resume = generation.call.resume
        generation.weight_version = self.weight_version if resume is None else resume.weight_version
        self.recent_ttft.arrived(generation.engine_id, generation.arrival)
        outcome = "cancelled"
        try:
            with generation_span(generation) as span:
                async with aclosing(self._observed(generation, span)) as deltas:
                    async for item in deltas:
                        yield item
            outcome = "ok"
        except RayLLMError as error:
            outcome = error.code
            raise
        except Exception:
            outcome = RayLLMError.code
            raise
        finally:
            if self._live.get(generation.request_id) is generation:
                del self._live[generation.request_id]
            self.recent_ttft.left(generation.engine_id)
            face = generation.call.face
            self.metrics.ended(face, outcome)
            self.metrics.observe(DURATION, face, time.monotonic() - generation.arrival)

    async def abort(self, request_id: str) -> bool:
        """At whichever replica it came in. False: no such request is live. Raises EngineUnavailableError when that
        cannot be told."""
        if self._abort_everywhere is None:
            return self.abort_here(request_id)
        return await self._abort_everywhere(request_id)

    def abort_here(self, request_id: str) -> bool:
        """If it came in at this replica, wherever it runs. False: no such request is live."""
        generation = self._live.get(request_id)
        return generation is not None and self._abort(generation, f"request {request_id} was aborted")

    def _abort(self, generation: Generation, message: str) -> bool:
        aborted = [self._engine.abort(request.request_id, message) for request in generation.requests]
        return any(aborted)

    def _take_id(self, generation: Generation) -> None:
        request_id, attempt = generation.request_id, generation.call.attempt
        live = self._live.get(request_id)
        if live is not None and attempt <= live.call.attempt:
            raise RequestExistsError(f"request_id: {request_id!r} is in use by a live request")
        if live is not None:
            self._abort(live, f"attempt {attempt} of request {request_id} took the place of this one")
        self._live[request_id] = generation

    async def _observed(self, generation: Generation, span: Span) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        usage = generation.usage
        usage.prompt_tokens = sum(len(request.prompt_token_ids) for request in generation.requests)
        usage.completion_tokens = 0 if generation.call.resume is None else generation.call.resume.num_tokens
        face, metrics = generation.call.face, self.metrics
        last: dict[tuple[int, int], float] = {}
        cached: dict[int, int] = {}
        requests = [replace(each, weight_version=generation.weight_version) for each in generation.requests]
        async with aclosing(_merge([self._engine.generate(request) for request in requests])) as deltas:
            async for prompt_index, delta in deltas:
                now = time.monotonic()
                key = (prompt_index, delta.index)
                if not last:
                    metrics.observe(TIME_TO_FIRST_TOKEN, face, now - generation.arrival)
                    metrics.observe(QUEUE, face, delta.queue_s)
                    self.recent_ttft.answered(generation.engine_id)
                    span.add_event("first_token")
                elif key in last:
                    metrics.observe(INTER_TOKEN, face, now - last[key])
                last[key] = now
                usage.completion_tokens += len(delta.token_ids)
                if delta.num_cached_tokens > cached.get(prompt_index, 0):
                    usage.cached_tokens += delta.num_cached_tokens - cached.get(prompt_index, 0)
                    cached[prompt_index] = delta.num_cached_tokens
                yield prompt_index, delta

    def _timeout_s(self, timeout_ms: int | None) -> float:
        if timeout_ms is None:
            return self._max_request_s
        if not 1 <= timeout_ms <= MAX_TIMEOUT_MS:
            raise InvalidRequestError("timeout_ms", f"must be in [1, {MAX_TIMEOUT_MS}]")
        return min(timeout_ms / 1000, self._max_request_s)


async def _merge(streams: Sequence[AsyncGenerator[OutputDelta, None]]) -> AsyncGenerator[tuple[int, OutputDelta], None]:
    """All the streams' deltas as they come. The first error ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for delta in stream:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, OutputDelta | None]] = asyncio.Queue()

    async def pump(i: int, stream: AsyncGenerator[OutputDelta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    queue.put_nowait((i, delta))
        finally:
            queue.put_nowait((i, None))

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        unfinished = len(tasks)
        while unfinished:
            i, delta_or_end = await queue.get()
            if delta_or_end is not None:
                yield i, delta_or_end
            else:
                await tasks[i]
                unfinished -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
