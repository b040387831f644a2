"""What a run tells of itself while it goes on: the newest step in a small file, all steps in metrics.parquet and as
TensorBoard's events.

The first two are replaced whole, never written into, so that a reader sees one state or the next. Knows no tensors and
no ranks: one process writes.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from rayllm.core.errors import TrainingError
from rayllm.train.data.parquet import open_parquet, readable
from rayllm.train.tensorboard import EventFile

_PROGRESS, METRICS = "progress.json", "metrics.parquet"
_NO_FIGURES = {"step", "steps", "pid"}
_FLUSH_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """After `step` of `steps`; of step 0 `measures` alone are known, and other figures are NaN.

    `measures`: what the recipe tells of a step beside its loss; each is a column of its own in metrics.parquet.
    `count`: the targets or pairs that the step's loss was taken over, on all ranks; `tokens_per_second`: all tokens of
    the step, padding too, by the wall clock; `flops_per_second`: what these take by the model's shape
    (`rayllm.train.flops`), of all ranks. `mfu`: its share of the peak that the cards' data sheet states; where none is
    known, on a CPU say, `matmul_share`: of the rate that matrix products reached as the run began. `memory_bytes`: the
    most that rank 0 has held, on the GPU where there is one; `pid`: rank 0's process."""

    step: int
    steps: int
    loss: float
    measures: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    count: int
    tokens_per_second: float
    flops_per_second: float
    mfu: float | None
    matmul_share: float | None
    seconds: float
    memory_bytes: int
    pid: int


class ProgressWriter:
    """A run that goes on from step n forgets what an earlier attempt said of later ones."""

    def __init__(self, run: Path, first_step: int) -> None:
        self._run = run
        run.mkdir(parents=True, exist_ok=True)
        self._rows = [row for row in read_metrics(run) if row.step <= first_step] if first_step else []
        self._events = EventFile(run, first_step)
        self._flushed = time.monotonic()

    def add(self, progress: Progress) -> None:
        self._rows.append(progress)
        _replace(self._run / _PROGRESS, msgspec.json.encode(progress))
        self._events.add(progress.step, figures(progress))
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Metrics to the disk; also done now and then by `add`."""
        if self._rows:
            sink = pa.BufferOutputStream()
            rows = [_flat(row) for row in self._rows]
            columns = dict.fromkeys(name for row in rows for name in row)  # a recipe may tell more of some steps
            pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), sink)
            _replace(self._run / METRICS, sink.getvalue().to_pybytes())
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._events.close()


def figures(progress: Progress) -> dict[str, float]:
    """What there is to draw over the steps, if it is finite."""
    row = {name: value for name, value in _flat(progress).items() if name not in _NO_FIGURES and value is not None}
    return {name: value for name, value in row.items() if math.isfinite(value)}


def read_metrics(run: Path) -> list[Progress]:
    """All steps that are on the disk. DataError if they cannot be read."""
    path = run / METRICS
    if not path.exists():
        return []
    file = open_parquet(path)
    with readable(path):
        return [_of_flat(row) for row in file.read().to_pylist()]


def read_progress(run: Path) -> Progress | None:
    """The newest step. None before the first, and where it cannot be told, as of figures that are not finite."""
    try:
        return msgspec.json.decode((run / _PROGRESS).read_bytes(), type=Progress)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _flat(progress: Progress) -> dict[str, Any]:
    row = asdict(progress)
    measures = row.pop("measures")
    return {**row, **measures}


def _of_flat(row: dict[str, Any]) -> Progress:
    own = {field.name for field in fields(Progress)}
    measures = {name: row.pop(name) for name in list(row) if name not in own}
    return Progress(**row, measures={name: value for name, value in measures.items() if value is not None})


def _replace(path: Path, content: bytes) -> None:
    staging = path.with_name(f".{path.name}.partial")
    try:
        staging.write_bytes(content)
        staging.replace(path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error
