"""The engine: a scheduler and an executor, one step at a time.

Knows nothing of text, of clients or of how a batch is run. `add` and `abort` may be called from any thread while
another is inside `step`: the lock is held only while the scheduler is touched, never while the model runs.
"""

import threading

from rayllm.core.types import Request
from rayllm.engine.executor import Executor
from rayllm.scheduler.scheduler import Scheduler, SequenceOutput


class Engine:
    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler = scheduler
        self.lock = threading.RLock()
        self.num_steps = 0
        self._executor = executor
        self._in_flight = 0

    def add(self, request: Request) -> None:
        """Raises CapacityError when the queue is full, InvalidRequestError for a request_id that is live."""
        with self.lock:
            self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        with self.lock:
            self.scheduler.abort(request_id, index)

    @property
    def has_work(self) -> bool:
        return self._in_flight > 0 or self.scheduler.has_work

    def step(self) -> list[SequenceOutput]:
        self.launch()
        return self.finish()

    def launch(self) -> None:
        """Submit batches until the pipeline is full or nothing more can be scheduled."""
        while self._in_flight < self._executor.in_flight:
            with self.lock:
                batch = self.scheduler.schedule()
            if batch is None:
                return
            self._executor.submit(batch)
            self._in_flight += 1

    def finish(self) -> list[SequenceOutput]:
        """Wait for the oldest batch and take in its tokens. Raises EngineUnavailableError when a shard is lost."""
        if not self._in_flight:
            return []
        result = self._executor.collect()
        self._in_flight -= 1
        self.num_steps += 1
        with self.lock:
            return self.scheduler.commit(result)

    def close(self) -> None:
        self._executor.close()
