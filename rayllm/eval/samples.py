"""The rows of a run on disk: Parquet shards that are complete or not there, so that a killed run goes on.

DIR/run.json                      what the rows have in common; a folder holds one run
DIR/samples/TASK/00000.parquet    rows in the order in which they were done
DIR/spent.json                    seconds and tokens that the rows have taken, over all parts of the run
DIR/results.json                  the metrics of each task that is done
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayllm.core.errors import ConfigError, DataError
from rayllm.eval.record import SCHEMA

# A shard is written when it has so many rows or is so old: what a killed run may lose.
_SHARD_ROWS = 256
_SHARD_SECONDS = 10.0


class SampleStore:
    """`directory` None: rows are dropped. `on_flush` is called when rows have been written. Not thread-safe."""

    def __init__(self, directory: Path | None, task: str, on_flush: Callable[[], None] = lambda: None) -> None:
        self._on_flush = on_flush
        self._directory = None if directory is None else directory / "samples" / task
        self._rows: list[dict[str, Any]] = []
        self._written = time.monotonic()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Those that earlier runs have written."""
        if self._directory is not None:
            for path in self._shards():
                yield from _read(path)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _SHARD_ROWS or time.monotonic() - self._written >= _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._written = time.monotonic()
        if self._directory is None or not self._rows:
            self._rows.clear()
            return
        table = pa.Table.from_pylist(self._rows, schema=SCHEMA)
        self._rows.clear()
        with _writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            # After the last one, however many there are: a damaged one may have been deleted.
            number = max((int(shard.stem) for shard in self._shards() if shard.stem.isdecimal()), default=-1) + 1
            path = self._directory / f"{number:05d}.parquet"
            unfinished = path.with_suffix(".tmp")
            pq.write_table(table, unfinished, compression="zstd")
            os.replace(unfinished, path)
        self._on_flush()

    def _shards(self) -> list[Path]:
        assert self._directory is not None
        return sorted(self._directory.glob("*.parquet"))


def claim(directory: Path, run: Mapping[str, Any]) -> None:
    """Makes the folder that of this run. ConfigError if it holds another, and says in what they differ."""
    path = directory / "run.json"
    if path.is_file():
        earlier = _read_json(path)
        _earlier_tasks(directory)  # if they cannot be read, this is said before anything is run
        differing = [
            f"{name}: {earlier.get(name)!r} there, {value!r} here"
            for name, value in run.items()
            if earlier.get(name) != value
        ]
        if differing:
            raise ConfigError(f"{directory}: holds another run ({'; '.join(differing)}); choose another --output")
        return
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    _write_json(path, run)


def read_spent(directory: Path) -> dict[str, Any]:
    """Empty before the first rows."""
    path = directory / "spent.json"
    return _read_json(path) if path.is_file() else {}


def write_spent(directory: Path, spent: Mapping[str, Any]) -> None:
    _write_json(directory / "spent.json", spent)


def write_results(directory: Path, report: Mapping[str, Any]) -> None:
    """Adds this run's tasks to those that the folder has results of already."""
    _write_json(directory / "results.json", {**report, "tasks": {**_earlier_tasks(directory), **report["tasks"]}})


def _earlier_tasks(directory: Path) -> dict[str, Any]:
    path = directory / "results.json"
    tasks = _read_json(path).get("tasks") if path.is_file() else {}
    if not isinstance(tasks, dict):
        raise DataError(f"{path}: is not what `rayllm eval` writes; delete it, the samples are kept beside it")
    return tasks


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it, or choose another --output") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not what `rayllm eval` writes; delete it, or choose another --output")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_suffix(".tmp")
    with _writing(path.parent):
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise ConfigError(f"--output {directory}: cannot be written to ({reason})") from error


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
        if table.schema.names != SCHEMA.names:
            raise ValueError("its columns are not those of samples")
        return list(table.cast(SCHEMA).to_pylist())
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({reason}); delete it to run its part again") from error
