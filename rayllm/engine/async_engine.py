"""The engine for many clients at once: a thread that steps, and an asyncio stream for each request.

The thread launches step k + 1 before it hands out the tokens of step k, so that detokenizing and waking the clients
overlap with the model. Whatever ends the thread ends every stream with a typed error: nothing waits for an engine that
is gone.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rayllm.core.config import EngineConfig
from rayllm.core.errors import (
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelOutputError,
    RayLLMError,
    RequestAbortedError,
)
from rayllm.core.types import FinishReason, Request
from rayllm.engine.build import EngineParts, ExecutorFactory, build_engine, prepare, start_local
from rayllm.engine.output_processor import OutputProcessor
from rayllm.engine.outputs import OutputDelta
from rayllm.scheduler.scheduler import SequenceOutput

logger = logging.getLogger(__name__)

_IDLE_CHECK_S = 0.25  # how often an engine without work looks whether it still has its shards
_LOAD_CHECK_S = 0.02  # and how far they are with weights that they load

LATE = "the deadline passed before the answer was complete"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot. The counters only grow; `step_s` and `framework_s` are `Engine`'s. `last_step_age_s` is 0 while there
    is nothing to do. The last two are of the last recovery, 0 before the first: how long a fault went unnoticed at
    most, and how long its repair took."""

    running: int
    waiting: int
    waiting_tokens: int
    free_blocks: int
    total_blocks: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    preemptions: int
    steps: int
    step_s: float
    framework_s: float
    prompt_tokens: int
    generated_tokens: int
    last_step_age_s: float
    recoveries: int
    last_detection_s: float
    last_recovery_s: float


class _Stream:
    """The pieces of one request on their way to its reader; a reader that lags finds them merged, so that what
    waits here is never more than the answer itself."""

    def __init__(self, request: Request) -> None:
        self.loop = asyncio.get_running_loop()
        self.unfinished = len(request.started)
        self._pending: dict[int, OutputDelta] = {}
        self._error: RayLLMError | None = None
        self._ready = asyncio.Event()

    def put(self, item: OutputDelta | RayLLMError) -> None:
        """On the reader's event loop."""
        if isinstance(item, RayLLMError):
            self._error = self._error or item
        elif (pending := self._pending.get(item.index)) is not None:
            pending.extend(item)
        else:
            self._pending[item.index] = item
        self._ready.set()

    async def next(self) -> list[OutputDelta]:
        await self._ready.wait()
        self._ready.clear()
        pending = list(self._pending.values())
        self._pending.clear()
        if self._error is not None and not pending:
            raise self._error
        if self._error is not None:
            self._ready.set()
        self.unfinished -= sum(delta.finish_reason is not None for delta in pending)
        return pending


class AsyncEngine:
    """`stall_timeout_s`: a step that takes longer, while there is work, makes `check_health` fail. By default that is
    longer than shards may take for a step (`ray_executor.STEP_TIMEOUT_S`) before they are replaced."""

    def __init__(self, parts: EngineParts, *, stall_timeout_s: float = 150.0) -> None:
        self.tokenizer = parts.tokenizer
        self.limits = parts.limits
        self._engine = parts.engine
        self._prepared = parts.prepared
        self._processor = OutputProcessor(parts.tokenizer)
        self._streams: dict[str, _Stream] = {}
        self._stall_timeout_s = stall_timeout_s
        self._changed = threading.Condition(self._engine.lock)
        self._draining = False
        self._closing = False
        self._recovering = False
        self._failure: EngineUnavailableError | None = None
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, config: EngineConfig, start_executor: ExecutorFactory = start_local) -> Self:
        """Raises ConfigError or CheckpointError when the model cannot be loaded."""
        return cls(build_engine(prepare(config), start_executor))

    async def generate(self, request: Request) -> AsyncGenerator[OutputDelta, None]:
        """The answer's pieces as they come, those of the `n` sequences interleaved. Closing it aborts the request.

        Raises InvalidRequestError, CapacityError (the queue is full) or EngineUnavailableError before the first piece;
        DeadlineExceededError, RequestAbortedError, ModelOutputError or EngineUnavailableError after any.
        """
        self.limits.check(request.prompt_token_ids, request.params)
        self.limits.check_resume(request)
        stream = _Stream(request)
        self._open(request, stream)
        timer = None
        if request.deadline is not None:  # the reader's own timer, so that it holds whatever the engine's thread does
            timer = stream.loop.call_later(request.deadline - time.monotonic(), self._expire, request.request_id)
        try:
            while stream.unfinished:
                for delta in await stream.next():
                    yield delta
        finally:
            if timer is not None:
                timer.cancel()
            self._end(request.request_id)

    def abort(self, request_id: str, message: str | None = None) -> bool:
        """Its stream ends with RequestAbortedError, which says `message`. False: no such request is live."""
        with self._changed:
            return self._end(request_id, RequestAbortedError(message or f"request {request_id} was aborted"))

    @property
    def weight_version(self) -> str:
        """The weights that answer a request which names none."""
        return self._engine.weights.current.version

    async def load_weights(self, directory: Path) -> str:
        """Weights to be held beside the current ones; requests may name them, and `use_weights` makes them current.
        Steps go on meanwhile. At most two versions are held: a third one waits until no request has the other one.

        Returns their version. Raises CheckpointError or ConfigError for what is damaged or no replacement for the
        running weights (`Prepared.replacement`), PromotionError while others are being loaded, EngineUnavailableError
        when a shard is lost meanwhile.
        """
        weights = await asyncio.to_thread(self._prepared.replacement, directory)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._closing:
                raise EngineUnavailableError("the server is shutting down")
            done = self._engine.weights.load(weights)
            self._changed.notify_all()
        await asyncio.wrap_future(done)
        return weights.version

    @property
    def is_recovering(self) -> bool:
        """Requests wait until lost shards are replaced."""
        return self._recovering

    def holds_weights(self, version: str) -> bool:
        return any(each.version == version for each in self._engine.weights.all)

    def use_weights(self, version: str) -> None:
        """New requests get them; those that are live keep theirs. Raises PromotionError unless they are held."""
        self._engine.weights.use(version)

    def prompt_digests(self, request: Request, *, max_blocks: int) -> list[bytes]:
        """What the first blocks of its prompt are called in the cache of this and of any engine of its weights."""
        version = self.weight_version if request.weight_version is None else request.weight_version
        return self._engine.scheduler.prompt_digests(request, version, max_blocks=max_blocks)

    def cached_blocks(self, digests: Iterable[bytes]) -> int:
        """How many of a prompt's first blocks are in the prefix cache now."""
        with self._changed:
            return self._engine.scheduler.cached_blocks(digests)

    def recent_digests(self, limit: int) -> list[bytes]:
        """Of at most so many blocks of the prefix cache, those computed or found last first."""
        with self._changed:
            return self._engine.scheduler.recent_digests(limit)

    def stats(self) -> EngineStats:
        with self._changed:
            scheduler = self._engine.scheduler
            recovery = self._engine.last_recovery
            return EngineStats(
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                waiting_tokens=scheduler.waiting_tokens,
                free_blocks=scheduler.free_blocks,
                total_blocks=scheduler.num_blocks,
                prefix_hit_tokens=scheduler.prefix_hit_tokens,
                prefix_query_tokens=scheduler.prefix_query_tokens,
                preemptions=scheduler.preemptions,
                steps=self._engine.num_steps,
                step_s=self._engine.step_seconds,
                framework_s=self._engine.framework_seconds,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                last_step_age_s=time.monotonic() - self._last_progress if self._engine.has_work else 0.0,
                recoveries=self._engine.num_recoveries,
                last_detection_s=recovery.detection_s if recovery is not None else 0.0,
                last_recovery_s=recovery.recovery_s if recovery is not None else 0.0,
            )

    def check_health(self) -> None:
        """Health is progress. Raises EngineUnavailableError when the engine is lost or a step is overdue.

        An engine that replaces its shards is well: that has a time limit of its own, and nobody else would be faster.
        """
        if self._failure is not None:
            raise self._failure
        if self._recovering:
            return
        age = self.stats().last_step_age_s
        if age > self._stall_timeout_s:
            raise EngineUnavailableError(f"no step was completed for {age:.0f} s although there is work")

    def check_integrity(self) -> None:
        """Raises AssertionError when the scheduler's books do not balance."""
        with self._changed:
            self._engine.scheduler.check_integrity()

    async def close(self, *, drain_timeout_s: float = 0.0) -> None:
        """Refuse new requests, let the running ones finish for up to `drain_timeout_s`, then end the rest."""
        self._draining = True
        give_up = time.monotonic() + drain_timeout_s
        while self._streams and self._failure is None and time.monotonic() < give_up:
            await asyncio.sleep(0.02)
        with self._changed:
            self._closing = True
            self._end_all(EngineUnavailableError("the server is shutting down"))
            self._changed.notify_all()
            recovering = self._recovering
        if recovering:
            await asyncio.to_thread(self._engine.close)
        await asyncio.to_thread(self._thread.join)
        self._engine.weights.close(EngineUnavailableError("the server is shutting down"))
        self._engine.close()

    def _open(self, request: Request, stream: _Stream) -> None:
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._draining:
                raise EngineUnavailableError("the server is shutting down")
            if request.deadline is not None and request.deadline <= time.monotonic():
                raise DeadlineExceededError("the deadline had passed when the request arrived")
            if request.request_id in self._streams:
                raise InvalidRequestError("request_id", f"{request.request_id!r} is in use by a live request")
            if not self._engine.has_work:
                self._last_progress = time.monotonic()
            self._engine.add(request)
            try:
                self._processor.add(request)
            except InvalidRequestError:
                self._engine.abort(request.request_id)
                raise
            self._streams[request.request_id] = stream
            self._prompt_tokens += len(request.prompt_token_ids)
            self._changed.notify_all()

    def _end(self, request_id: str, error: RayLLMError | None = None) -> bool:
        with self._changed:
            stream = self._streams.pop(request_id, None)
            if stream is None:
                return False
            self._engine.abort(request_id)
            self._processor.remove(request_id)
            if error is not None:
                _send([(stream, error)])
            self._changed.notify_all()
            return True

    def _end_all(self, error: RayLLMError) -> None:
        for request_id in list(self._streams):
            self._end(request_id, error)

    def _run(self) -> None:
        try:
            self._loop()
        except EngineUnavailableError as error:
            self._fail(error)
        except Exception:
            # A bug here must end the streams, not leave them waiting.
            logger.exception("the engine stopped on an internal error")
            self._fail(EngineUnavailableError("the engine stopped on an internal error"))

    def _loop(self) -> None:
        outputs: list[SequenceOutput] = []
        while True:
            try:
                if not self._await_work(outputs):
                    return
                self._engine.weights.tend()
                self._engine.launch()
                self._deliver(outputs)
                outputs.clear()
                steps = self._engine.num_steps
                outputs = self._engine.finish()
                if self._engine.num_steps > steps:
                    self._last_progress = time.monotonic()
            except EngineUnavailableError as lost:
                self._deliver(outputs)
                outputs.clear()
                self._recover(lost)

    def _await_work(self, outputs: list[SequenceOutput]) -> bool:
        """False: the engine is to end."""
        with self._changed:
            while not (self._closing or outputs or self._engine.has_work):
                is_loading = self._engine.weights.is_loading
                self._changed.wait(_LOAD_CHECK_S if is_loading else _IDLE_CHECK_S)
                self._engine.check()
                if is_loading:
                    break
            return not self._closing

    def _recover(self, lost: EngineUnavailableError) -> None:
        """Streams wait meanwhile, and new requests queue; aborts and deadlines take effect at once, for they need the
        lock alone. Raises EngineUnavailableError when new shards are not ready in time."""
        with self._changed:
            for request_id in self._engine.requeue():
                self._end(request_id, EngineUnavailableError(f"{lost}, again and again while this request ran"))
            if self._closing:
                return
            self._recovering = True
        self._engine.recover(lost)
        with self._changed:
            self._recovering = False
            self._last_progress = time.monotonic()

    def _expire(self, request_id: str) -> None:
        self._end(request_id, DeadlineExceededError(LATE))

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        if not outputs:
            return
        items: list[tuple[_Stream, OutputDelta | RayLLMError]] = []
        with self._changed:
            for request_id, delta in self._processor.process(outputs):
                if delta.finish_reason is FinishReason.ERROR:
                    self._end(request_id, ModelOutputError())
                    continue
                if isinstance(delta.stop_reason, str):
                    self._engine.abort(request_id, delta.index)
                items.append((self._streams[request_id], delta))
            self._generated_tokens += len(items)
        _send(items)

    def _fail(self, error: EngineUnavailableError) -> None:
        with self._changed:
            self._failure = error
            self._end_all(error)
            self._engine.weights.close(error)


def _send(items: Iterable[tuple[_Stream, OutputDelta | RayLLMError]]) -> None:
    """One wake-up per event loop, however many streams it has."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, OutputDelta | RayLLMError]]] = defaultdict(list)
    for stream, item in items:
        by_loop[stream.loop].append((stream, item))
    for loop, batch in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_put_all, batch)


def _put_all(batch: list[tuple[_Stream, OutputDelta | RayLLMError]]) -> None:
    for stream, item in batch:
        stream.put(item)
