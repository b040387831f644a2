"""Weights on their way into a model runner, read beside its steps."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from rayllm.core.errors import CheckpointError
from rayllm.engine.model_runner import ModelRunner, ServedModel
from rayllm.engine.weights import Weights

logger = logging.getLogger(__name__)


class BackgroundLoad:
    """Reads in a thread of its own, which computes on one core and so leaves the threads of the steps alone: see
    `rayllm.engine.executor.LocalExecutor` for what a second pool of them would cost."""

    def __init__(self, runner: ModelRunner, weights: Weights) -> None:
        self.weights = weights
        self._runner = runner
        thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._model: Future[ServedModel] = thread.submit(self._load)
        thread.shutdown(wait=False)

    @property
    def done(self) -> bool:
        return self._model.done()

    def hold(self) -> None:
        """Once done: its steps may name them from now on. Raises CheckpointError if they could not be read."""
        self._runner.hold(self.weights.version, self._model.result())

    def _load(self) -> ServedModel:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of those that torch sees first while this lasts
        try:
            with self._runner.beside_steps():
                return self._runner.load(self.weights.open())
        except CheckpointError:
            raise
        except Exception as error:
            # Want of memory, a file that goes away: nothing about new weights may end the steps with the others.
            logger.exception("weights %s were not loaded", self.weights.version)
            raise CheckpointError(self.weights.directory, f"cannot be loaded beside what runs: {error}") from error
        finally:
            torch.set_num_threads(num_threads)
