"""The engine: a scheduler and an executor, one step at a time.

Knows nothing of text, of clients or of how a batch is run. `add` and `abort` may be called from any thread while
another is inside `step`: the lock is held only while the scheduler is touched, never while the model runs.
"""

import threading
import time

from rayllm.core.errors import EngineUnavailableError
from rayllm.core.types import Request
from rayllm.engine.executor import Executor, Recovery
from rayllm.engine.held_weights import HeldWeights
from rayllm.engine.weights import Weights
from rayllm.scheduler.scheduler import Scheduler, SequenceOutput

# A request that ran at so many losses, and got hardly any further between them, may be what causes them.
MAX_LOSSES = 3
_PROGRESS_TOKENS = 16


class Engine:
    """`step_seconds`: how long batches were with the ranks, all together; `framework_seconds`: how long there was work
    and no batch was, which is what scheduling costs that does not overlap with the model. Neither counts recoveries.

    `weights`: those that the executor holds; others take their place between two steps."""

    def __init__(self, scheduler: Scheduler, executor: Executor, weights: Weights) -> None:
        """The executor holds `weights`, which are the scheduler's `weight_version`."""
        self.scheduler = scheduler
        self.lock = threading.RLock()
        self.weights = HeldWeights(weights, scheduler, executor, self.lock)
        self.num_steps = 0
        self.num_recoveries = 0
        self.last_recovery: Recovery | None = None
        self._losses: dict[str, tuple[int, int]] = {}  # how many, and the tokens at the last, of those that ran then
        self._executor = executor
        self._in_flight = 0
        self.step_seconds = 0.0
        self.framework_seconds = 0.0
        self._since: float | None = None  # when the ranks last got or lost their only batch; None: nothing to do

    def add(self, request: Request) -> None:
        """Raises CapacityError when the queue is full, InvalidRequestError for a request_id that is live,
        EngineUnavailableError for weights that are not held."""
        with self.lock:
            self.weights.check(request.weight_version)
            if not self.has_work:
                self._since = time.monotonic()
            self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        with self.lock:
            self.scheduler.abort(request_id, index)

    @property
    def has_work(self) -> bool:
        return self._in_flight > 0 or self.scheduler.has_work

    def step(self) -> list[SequenceOutput]:
        try:
            self.weights.tend()
            self.launch()
            return self.finish()
        except EngineUnavailableError as lost:
            if self.requeue():
                raise
            self.recover(lost)
            return []

    def launch(self) -> None:
        """Submit batches until the pipeline is full or nothing more can be scheduled.

        This, `finish` and `weights.tend` raise EngineUnavailableError when a shard is lost, which `requeue` and
        `recover` answer.
        """
        while self._in_flight < self._executor.in_flight:
            with self.lock:
                batch = self.scheduler.schedule()
            if batch is None:
                return
            self._executor.submit(batch)
            if not self._in_flight:
                self.framework_seconds += self._elapsed()
            self._in_flight += 1

    def finish(self) -> list[SequenceOutput]:
        """Wait for the oldest batch and take in its tokens."""
        if not self._in_flight:
            return []
        result = self._executor.collect()
        self._in_flight -= 1
        if not self._in_flight:
            self.step_seconds += self._elapsed()
        self.num_steps += 1
        with self.lock:
            outputs = self.scheduler.commit(result)
            if not self.has_work:
                self._since = None
            return outputs

    def check(self) -> None:
        """Raises EngineUnavailableError when a shard was lost while there was nothing to do."""
        self._executor.check()

    def requeue(self) -> list[str]:
        """A lost shard is a preemption of everything: what ran waits again with its tokens, to be computed anew.

        Returns the requests that are aborted, because with them it might never end: see MAX_LOSSES.
        """
        with self.lock:
            suspects = self._suspects()
            self._in_flight = 0
            self._since = None
            self.scheduler.requeue_all()
            for request_id in suspects:
                self.scheduler.abort(request_id)
            self.weights.lost()
            return suspects

    def recover(self, lost: EngineUnavailableError) -> None:
        """Wait for new shards. Raises EngineUnavailableError when they do not come in time."""
        self.last_recovery = self._executor.recover(lost, self.weights.all)
        self.num_recoveries += 1

    def close(self) -> None:
        """From any thread; ends a `recover` that is under way."""
        self._executor.close()

    def _elapsed(self) -> float:
        """Seconds since this was last called, if there was work all the time."""
        now = time.monotonic()
        since, self._since = self._since, now
        return 0.0 if since is None else now - since

    def _suspects(self) -> list[str]:
        losses = {}
        for request_id, num_tokens in self.scheduler.running_tokens().items():
            count, before = self._losses.get(request_id, (0, num_tokens))
            losses[request_id] = (count + 1 if num_tokens - before < _PROGRESS_TOKENS else 1, num_tokens)
        self._losses = losses
        return [request_id for request_id, (count, _) in losses.items() if count >= MAX_LOSSES]
