"""Where a batch runs: in this process, or on a group of shards."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from rayllm.core.errors import EngineUnavailableError
from rayllm.engine.background_load import BackgroundLoad
from rayllm.engine.model_runner import ModelRunner
from rayllm.engine.weights import Weights
from rayllm.scheduler.batch import Batch, StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """How shards were lost and replaced. `detection_s`: at most so long after the fault was it noticed; `recovery_s`:
    from then until new shards were loaded."""

    cause: str
    detection_s: float
    recovery_s: float


class Executor(Protocol):
    """Runs batches in the order in which they were submitted.

    `in_flight` is how many may be submitted before the oldest is collected: the depth of the pipeline.

    All but `recover` and `close` raise EngineUnavailableError when a shard is lost or stalls, and from then on, until
    `recover` has returned.
    """

    in_flight: int

    def submit(self, batch: Batch) -> None: ...

    def collect(self) -> StepResult:
        """Wait for the oldest submitted batch."""
        ...

    def check(self) -> None:
        """Whether all is well, also while nothing is submitted."""
        ...

    def load(self, weights: Weights) -> None:
        """Every rank begins to read them, beside its steps. One at a time: `loaded` ends it."""
        ...

    def loaded(self) -> bool:
        """Whether every rank has what `load` asked for, so that batches may name it. Raises CheckpointError once one
        has failed and the others have ended; then none holds it."""
        ...

    def drop(self, weights: Weights) -> None:
        """No batch will name them any more."""
        ...

    def recover(self, lost: EngineUnavailableError, held: Sequence[Weights]) -> Recovery:
        """Replace the shards: the new ones have the weights `held` and know no sequence, and what was submitted is
        forgotten. `lost` is what was raised. Raises EngineUnavailableError when they cannot be replaced, or `close`
        was called."""
        ...

    def close(self) -> None:
        """From any thread; ends a `recover` that is under way."""
        ...


class LocalExecutor:
    """One model runner in this process, on a thread of its own.

    Loading, too, happens there: OpenMP keeps a pool for each thread that ever entered it, and once the pools together
    have more threads than there are processors their waiting threads sleep at once, which makes a step of many short
    kernels 1.6 times slower.
    """

    in_flight = 1

    def __init__(self, load: Callable[[], ModelRunner]) -> None:
        """Raises what `load` raises."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._submitted: deque[Future[StepResult | None]] = deque()
        self._loading: BackgroundLoad | None = None
        try:
            self._runner = self._thread.submit(load).result()
        except BaseException:
            self._thread.shutdown(cancel_futures=True)
            raise

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks_that_fit

    def submit(self, batch: Batch) -> None:
        self._submitted.append(self._thread.submit(self._runner.execute, batch))

    def collect(self) -> StepResult:
        result = self._submitted[0].result()  # a wait that Ctrl-C ends can be taken up again
        self._submitted.popleft()
        assert result is not None, "a single rank always samples"
        return result

    def check(self) -> None:
        """This process is alive."""

    def load(self, weights: Weights) -> None:
        self._loading = BackgroundLoad(self._runner, weights)

    def loaded(self) -> bool:
        loading = self._loading
        assert loading is not None, "nothing is being loaded"
        if not loading.done:
            return False
        self._loading = None
        loading.hold()
        return True

    def drop(self, weights: Weights) -> None:
        self._thread.submit(self._runner.drop, weights.version).result()

    def recover(self, lost: EngineUnavailableError, held: Sequence[Weights]) -> Recovery:
        raise lost

    def close(self) -> None:
        self._submitted.clear()
        self._thread.shutdown(cancel_futures=True)
