"""The files of a training set: Parquet, JSON Lines and plain text, read row by row in pieces that workers can share.

`check_source` reads a file whole before any work begins, so that what is wrong with a row is said at once, by its file
and place. A text file is one document.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rayllm.core.errors import DataError
from rayllm.train.data.parquet import column_names, open_parquet, readable
from rayllm.train.data.rows import Kind, Row, parse_row

SUFFIXES = (".parquet", ".jsonl", ".txt")
_CHUNK_BYTES = 4 << 20  # of JSON Lines, about
_BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive rows of one file: of JSON Lines the bytes from `start` to `stop`, of Parquet the row groups.

    `first_row` counts the file's rows from 0; `first_line` its lines from 1 (JSON Lines; blank lines are no rows).
    """

    path: str
    start: int
    stop: int
    first_row: int
    first_line: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    path: str
    sha256: str
    num_rows: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A row and where it lies: `index` counts the file's rows from 0, `place` says it to a person."""

    index: int
    place: str
    row: Row


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files themselves, and all of a known kind below the folders, by name. DataError names what is not there, of
    no known kind, or given twice."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}"))
            if not found:
                raise DataError(f"{path}: holds no file ending in {', '.join(SUFFIXES)}")
            files += found
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise DataError(f"{path}: ends in none of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    files = [path.absolute() for path in files]  # a worker has a folder of its own
    if len(set(map(Path.resolve, files))) < len(files):
        twice = next(path for path in files if sum(path.samefile(other) for other in files) > 1)
        raise DataError(f"{twice}: is given twice")
    return files


def check_source(path: Path, kind: Kind) -> Source:
    """Reads every row once. DataError names the file and the first row that is wrong."""
    with readable(path), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    chunks = tuple(_chunks(path, kind))
    num_rows = sum(1 for chunk in chunks for _ in read_chunk(chunk, kind))
    if num_rows == 0:
        raise DataError(f"{path}: holds no rows")
    return Source(path=str(path), sha256=sha256, num_rows=num_rows, chunks=chunks)


def read_chunk(chunk: Chunk, kind: Kind) -> Iterator[Located]:
    """Raises as `check_source`."""
    path = Path(chunk.path)
    if path.suffix == ".txt":
        with readable(path):
            text = path.read_text(encoding="utf-8")
        yield _located(chunk, 0, "the file", {"text": text}, kind)
    elif path.suffix == ".jsonl":
        yield from _json_lines(chunk, kind)
    else:
        yield from _parquet_rows(chunk, kind)


def _chunks(path: Path, kind: Kind) -> Iterator[Chunk]:
    if path.suffix == ".txt":
        if kind is not Kind.TEXT:
            raise DataError(f"{path}: plain text has no column {', '.join(kind.columns)}")
        yield Chunk(path=str(path), start=0, stop=path.stat().st_size, first_row=0)
    elif path.suffix == ".jsonl":
        yield from _line_chunks(path)
    else:
        file = open_parquet(path)
        with readable(path):
            names = column_names(file)
            if missing := [column for column in kind.columns if column not in names]:
                raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(names)}")
            if twice := [column for column in kind.columns if names.count(column) > 1]:
                raise DataError(f"{path}: has {', '.join(twice)} more than once; it has {', '.join(names)}")
            first_row = 0
            for group in range(file.num_row_groups):
                yield Chunk(path=str(path), start=group, stop=group + 1, first_row=first_row)
                first_row += file.metadata.row_group(group).num_rows


def _line_chunks(path: Path) -> Iterator[Chunk]:
    with readable(path), path.open("rb") as file:
        start, stop, first_row, first_line, rows, lines = 0, 0, 0, 1, 0, 0
        for line in file:
            stop += len(line)
            lines += 1
            rows += bool(line.strip())
            if stop - start >= _CHUNK_BYTES:
                yield Chunk(path=str(path), start=start, stop=stop, first_row=first_row, first_line=first_line)
                start, first_row, first_line, rows, lines = stop, first_row + rows, first_line + lines, 0, 0
        if stop > start:
            yield Chunk(path=str(path), start=start, stop=stop, first_row=first_row, first_line=first_line)


def _json_lines(chunk: Chunk, kind: Kind) -> Iterator[Located]:
    path = Path(chunk.path)
    decoder = msgspec.json.Decoder()
    index = chunk.first_row
    with readable(path), path.open("rb") as file:
        file.seek(chunk.start)
        content = file.read(chunk.stop - chunk.start)
    for number, line in enumerate(content.split(b"\n")):
        if not line.strip():
            continue
        place = f"line {chunk.first_line + number}"
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{path}, {place}: is not JSON: {error}") from None
        yield _located(chunk, index, place, row, kind)
        index += 1


def _parquet_rows(chunk: Chunk, kind: Kind) -> Iterator[Located]:
    path = Path(chunk.path)
    file = open_parquet(path)
    index = chunk.first_row
    with readable(path):
        groups = range(chunk.start, chunk.stop)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=kind.columns, use_threads=False):
            for row in batch.to_pylist():
                yield _located(chunk, index, f"row {index} (from 0)", row, kind)
                index += 1


def _located(chunk: Chunk, index: int, place: str, row: Any, kind: Kind) -> Located:
    if not isinstance(row, dict):
        raise DataError(f"{chunk.path}, {place}: is a JSON {type(row).__name__}, not an object")
    try:
        return Located(index=index, place=place, row=parse_row(row, kind))
    except DataError as error:
        raise DataError(f"{chunk.path}, {place}: {error}") from None
