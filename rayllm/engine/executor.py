"""Where a batch runs: in this process, or on a group of shards."""

from collections import deque
from typing import Protocol

from rayllm.engine.model_runner import ModelRunner
from rayllm.scheduler.batch import Batch, StepResult


class Executor(Protocol):
    """Runs batches in the order in which they were submitted.

    `in_flight` is how many may be submitted before the oldest is collected: the depth of the pipeline.
    """

    in_flight: int

    def submit(self, batch: Batch) -> None: ...

    def collect(self) -> StepResult:
        """Wait for the oldest submitted batch. Raises EngineUnavailableError when a shard is lost or stalls."""
        ...

    def close(self) -> None: ...


class LocalExecutor:
    """One model runner in this process, on this thread."""

    in_flight = 1

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._submitted: deque[Batch] = deque()

    def submit(self, batch: Batch) -> None:
        self._submitted.append(batch)

    def collect(self) -> StepResult:
        result = self._runner.execute(self._submitted.popleft())
        assert result is not None, "a single rank always samples"
        return result

    def close(self) -> None:
        self._submitted.clear()
