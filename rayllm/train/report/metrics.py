"""All figures of all steps, as columns: those that every run has and whatever else its recipe told of a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayllm.core.errors import DataError
from rayllm.train.data.parquet import open_parquet, readable
from rayllm.train.progress import METRICS

Column = NDArray[np.float64]  # one number a step; NaN where none was told, or none that is finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """`steps`, ascending; `columns` of the same length, without those in which no number is."""

    steps: Column
    columns: Mapping[str, Column]


def read_columns(run: Path) -> Metrics:
    """DataError where there are none yet, or the file is damaged or not one of a run."""
    path = run / METRICS
    if not path.exists():
        raise DataError(
            f"{run}: has no metrics yet ({METRICS} is missing); a run writes them every ten seconds, and at checkpoints"
        )
    file = open_parquet(path)
    with readable(path):
        table = file.read()
    columns = {
        field.name: _numbers(column) for field, column in zip(table.schema, table.columns, strict=True) if _fits(field)
    }
    steps = columns.pop("step", np.zeros(0))
    if not steps.size or np.isnan(steps).any():
        raise DataError(f"{path}: names no steps; it is not what `rayllm train` writes")
    order = np.argsort(steps, kind="stable")
    kept = {name: column[order] for name, column in columns.items() if not np.isnan(column).all()}
    return Metrics(steps=steps[order], columns=kept)


def _fits(field: pa.Field) -> bool:
    return bool(pa.types.is_integer(field.type) or pa.types.is_floating(field.type))


def _numbers(column: pa.ChunkedArray) -> Column:
    values: Column = column.cast(pa.float64(), safe=False).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)
