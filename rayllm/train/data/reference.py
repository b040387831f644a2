"""What the reference model says of the answers of a preference data set: computed once, kept beside the key of all that
it depends on.

Knows no model: who has one computes the figures.
"""

import hashlib
import os
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from rayllm.core.errors import DataError
from rayllm.models.weight_version import weight_version
from rayllm.train.batch import MicroBatch
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.parquet import open_parquet, readable

REFERENCE = "reference"  # in `MicroBatch.document_values`
_KEY_PREFIX = "rayllm.reference."
_COLUMNS = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceKey:
    """What the figures depend on. `template` is "" for pairs of plain texts."""

    weights: str
    data: str
    template: str
    dtype: str

    @classmethod
    def of(cls, model_directory: Path, dataset: PackedDataset, dtype: str) -> "ReferenceKey":
        return cls(
            weights=weight_version(model_directory),
            data=dataset.info.fingerprint,
            template=dataset.info.template_sha256 or "",
            dtype=dtype,
        )

    def path(self, folder: Path) -> Path:
        """Figures of several models may lie in one folder."""
        digest = hashlib.sha256(" ".join(astuple(self)).encode()).hexdigest()
        return folder / f"reference-{digest[:16]}.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Of each sample of the data set, nats summed over the answer: `chosen` and `rejected`, float64 [samples]."""

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]

    def attach(self, batch: MicroBatch) -> MicroBatch:
        """With the figures as a value of each document; 0 for what pads it, which comes after the pairs."""
        samples = list(batch.sample_ids)
        values_N = torch.zeros(batch.num_documents, dtype=torch.float64)
        values_N[0 : 2 * len(samples) : 2] = torch.from_numpy(self.chosen[samples])
        values_N[1 : 2 * len(samples) : 2] = torch.from_numpy(self.rejected[samples])
        return replace(batch, document_values={**batch.document_values, REFERENCE: values_N})


def refuse_other(folder: Path, key: ReferenceKey) -> None:
    """DataError if there are figures in `folder`, but of another key: for a run that is to go on as it began."""
    if key.path(folder).exists():
        return
    for path in sorted(folder.glob("reference-*.parquet")):
        found = _stored_key(open_parquet(path))
        others = " and ".join(name for name, value in asdict(key).items() if found.get(name) != value)
        raise DataError(
            f"{path}: the run began with a reference of another {others};"
            " go on with what it began with, or give `run` another folder"
        )


def write_reference(folder: Path, key: ReferenceKey, reference: Reference) -> None:
    """Complete or not there."""
    path = key.path(folder)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    metadata = {_KEY_PREFIX + name: value for name, value in asdict(key).items()}
    schema = pa.schema([pa.field(name, pa.float64(), nullable=False) for name in _COLUMNS], metadata=metadata)
    columns = [pa.array(reference.chosen), pa.array(reference.rejected)]
    pq.write_table(pa.table(columns, schema=schema), unfinished, compression="zstd", write_page_checksum=True)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_reference(folder: Path, key: ReferenceKey, num_samples: int) -> Reference | None:
    """None if there are no figures for this key. DataError if the file is damaged, or says in itself that it is of
    another model, other data or another template."""
    path = key.path(folder)
    if not path.exists():
        return None
    file = open_parquet(path)
    found = _stored_key(file)
    for name, value in asdict(key).items():
        if found.get(name) != value:
            raise DataError(f"{path}: is of another {name}; delete it, and the reference is computed again")
    with readable(path):
        table = file.read(columns=_COLUMNS, use_threads=False)
    if table.num_rows != num_samples:
        raise DataError(f"{path}: has {table.num_rows} rows, the data set {num_samples}; delete it")
    chosen, rejected = (table[name].to_numpy() for name in _COLUMNS)
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        raise DataError(f"{path}: holds numbers that are not finite; delete it, and look at the reference model")
    return Reference(chosen=chosen, rejected=rejected)


def _stored_key(file: pq.ParquetFile) -> dict[str, str]:
    """What the file says that it is of, by the names of `ReferenceKey`; other metadata too."""
    metadata: dict[bytes, bytes] = file.metadata.metadata or {}
    return {name.decode().removeprefix(_KEY_PREFIX): value.decode() for name, value in metadata.items()}
