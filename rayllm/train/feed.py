"""What each optimizer step is fed with: micro-batches, and where the data is after them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rayllm.train.batch import MicroBatch
from rayllm.train.config import TrainConfig
from rayllm.train.data.cursor import Cursor
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.loader import Loader
from rayllm.train.mesh import TrainMesh
from rayllm.train.trainee import Trainee


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A run on one rank, before its first step and before a checkpoint is restored: `trainee` has the weights of the
    start model, whose `directory` this is."""

    config: TrainConfig
    directory: Path
    dataset: PackedDataset
    trainee: Trainee
    mesh: TrainMesh


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Of one step: this rank's micro-batches, the cursor after it, and what is to be told of it beside what its
    objective tells, the same on every rank."""

    batches: Sequence[MicroBatch]
    cursor: Cursor
    measures: Mapping[str, float] = field(default_factory=dict)


# How many steps are done, and where the data is -> the next step's work. Called by all ranks at once.
Feed = Callable[[int, Cursor], Work]


def packed_feed(setup: Setup, prepare: Callable[[MicroBatch], MicroBatch] = lambda batch: batch) -> Feed:
    """The next samples of the data set, each micro-batch as `prepare` leaves it."""
    loader = _loader(setup, num_epochs=None)

    def feed(step: int, cursor: Cursor) -> Work:
        return Work(batches=list(map(prepare, loader.step(cursor))), cursor=loader.after_step(cursor))

    return feed


def first_epoch(setup: Setup) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the run's first pass over its data, one after another."""
    loader, cursor = _loader(setup, num_epochs=1), Cursor(seed=setup.config.data.seed)
    while loader.num_micro_batches(cursor):
        yield from loader.step(cursor)
        cursor = loader.after_step(cursor)


def _loader(setup: Setup, num_epochs: int | None) -> Loader:
    batch = setup.config.batch
    return Loader(
        dataset=setup.dataset,
        samples_per_step=batch.tokens // batch.sequence_length,
        micro_batch_size=batch.rows,
        rank=setup.mesh.data_rank,
        num_ranks=setup.config.layout.data,
        num_epochs=num_epochs,
    )
