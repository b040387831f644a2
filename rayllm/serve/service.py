"""One path from a request to its answer, whichever face it came by: HTTP and gRPC only translate.

Knows neither protocol. Raises the errors of `rayllm.core.errors`; whoever leaves a generation early closes it, and that
aborts it in the engine.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from rayllm.core.errors import InvalidRequestError, ModelNotFoundError, RayLLMError
from rayllm.core.limits import ModelLimits
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import Request, SamplingParams
from rayllm.engine.async_engine import EngineStats
from rayllm.engine.outputs import OutputDelta
from rayllm.serve.metrics import DURATION, INTER_TOKEN, QUEUE, TIME_TO_FIRST_TOKEN, Metrics
from rayllm.serve.prompts import Prompt, PromptEncoder
from rayllm.serve.recent_ttft import RecentTtft
from rayllm.serve.tracing import Span, generation_span

DEFAULT_MAX_TOKENS = 16  # of a text or token prompt; a chat goes on to the end of its context
MAX_PROMPTS = 128
MAX_TIMEOUT_MS = 24 * 3600 * 1000

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")


class Engine(Protocol):
    """What serving needs of `AsyncEngine`."""

    tokenizer: Tokenizer
    limits: ModelLimits

    def generate(self, request: Request) -> AsyncGenerator[OutputDelta, None]: ...
    def abort(self, request_id: str) -> bool: ...
    def stats(self) -> EngineStats: ...
    def check_health(self) -> None: ...


def new_request_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """What either face parses a request into. `timeout_ms` None: as long as the server allows."""

    face: str  # "http" or "grpc", for the metrics
    model: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    request_id: str
    timeout_ms: int | None = None


@dataclass(kw_only=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(kw_only=True, slots=True)
class Generation:
    """A call that was found valid. `usage` is complete once the deltas are."""

    call: GenerateCall
    created: int  # seconds since 1970
    arrival: float  # monotonic seconds
    requests: tuple[Request, ...]  # one for each prompt
    usage: Usage = field(default_factory=Usage)

    @property
    def request_id(self) -> str:
        return self.call.request_id


class InferenceService:
    """`model` is the name clients use; `weight_version` says which weights answer. `max_request_s` bounds how long any
    request may take: the last resort against one whose client is gone without the server hearing of it. `replica` tells
    this replica from others in the metrics."""

    def __init__(
        self,
        engine: Engine,
        *,
        model: str,
        weight_version: str,
        max_request_s: float,
        replica: str | None = None,
    ) -> None:
        self.model = model
        self.weight_version = weight_version
        self.started = int(time.time())
        self.tokenizer = engine.tokenizer
        self.limits = engine.limits
        self.prompts = PromptEncoder(engine.tokenizer, engine.limits)
        self.metrics = Metrics(engine.stats, lambda: self.weight_version, replica=replica)
        self.recent_ttft = RecentTtft()
        self._engine = engine
        self._max_request_s = max_request_s
        self._live: dict[str, Generation] = {}

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
        except RayLLMError as error:
            self.metrics.ended(call.face, error.code)
            raise
        requests = tuple(
            Request(
                request_id=call.request_id if len(token_ids) == 1 else f"{call.request_id}#{i}",
                prompt_token_ids=ids,
                params=call.params,
                deadline=deadline,
            )
            for i, ids in enumerate(token_ids)
        )
        return Generation(call=call, created=int(time.time()), arrival=arrival, requests=requests)

    async def run(self, generation: Generation) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        """(prompt index, delta) as they come. Closing it aborts what is left; the blocks are free at once."""
        if generation.request_id in self._live:
            raise InvalidRequestError("request_id", f"{generation.request_id!r} is in use by a live request")
        self._live[generation.request_id] = generation
        self.recent_ttft.arrived(generation.request_id, generation.arrival)
        outcome = "cancelled"
        try:
            with generation_span(generation, self.weight_version) as span:
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
            del self._live[generation.request_id]
            self.recent_ttft.left(generation.request_id)
            face = generation.call.face
            self.metrics.ended(face, outcome)
            self.metrics.observe(DURATION, face, time.monotonic() - generation.arrival)

    def abort(self, request_id: str) -> bool:
        """False: no such request is live."""
        generation = self._live.get(request_id)
        if generation is None:
            return False
        aborted = [self._engine.abort(request.request_id) for request in generation.requests]
        return any(aborted)

    async def _observed(self, generation: Generation, span: Span) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        usage = generation.usage
        usage.prompt_tokens = sum(len(request.prompt_token_ids) for request in generation.requests)
        face, metrics = generation.call.face, self.metrics
        last: dict[tuple[int, int], float] = {}
        cached: dict[int, int] = {}
        async with aclosing(_merge([self._engine.generate(request) for request in generation.requests])) as deltas:
            async for prompt_index, delta in deltas:
                now = time.monotonic()
                key = (prompt_index, delta.index)
                if not last:
                    metrics.observe(TIME_TO_FIRST_TOKEN, face, now - generation.arrival)
                    metrics.observe(QUEUE, face, delta.queue_s)
                    self.recent_ttft.answered(generation.request_id)
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
