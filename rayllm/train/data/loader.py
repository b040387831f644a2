"""One rank's micro-batches of one step. Keeps nothing: where training is, is the cursor's, which the caller holds."""

from collections.abc import Iterator
from dataclasses import dataclass

from rayllm.core.errors import ConfigError
from rayllm.train.batch import MicroBatch
from rayllm.train.data.cursor import Cursor, deal
from rayllm.train.data.dataset import PackedDataset


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """`samples_per_step`: over all ranks and micro-batches. `rank` counts the groups that see different data, not the
    processes: ranks that share a model's parts read the same.

    `num_epochs` None: without end. Otherwise the last step takes what is left.
    """

    dataset: PackedDataset
    samples_per_step: int
    micro_batch_size: int
    rank: int = 0
    num_ranks: int = 1
    num_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples_per_step", "micro_batch_size", "num_ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(f"rank: {self.rank} is none of {self.num_ranks}")

    def num_micro_batches(self, cursor: Cursor) -> int:
        """Of the next step, on every rank; 0 when the epochs are over."""
        return -(-self._step_size(cursor) // (self.micro_batch_size * self.num_ranks))

    def step(self, cursor: Cursor) -> Iterator[MicroBatch]:
        """Read one by one, so that only one is held."""
        samples = cursor.next_samples(self._step_size(cursor), len(self.dataset))
        for own in deal(samples, micro_batch_size=self.micro_batch_size, rank=self.rank, num_ranks=self.num_ranks):
            yield self.dataset.micro_batch(own.tolist())

    def after_step(self, cursor: Cursor) -> Cursor:
        return cursor.advanced(self._step_size(cursor), len(self.dataset))

    def _step_size(self, cursor: Cursor) -> int:
        if self.num_epochs is None:
            return self.samples_per_step
        return min(self.samples_per_step, cursor.left(len(self.dataset), self.num_epochs))
