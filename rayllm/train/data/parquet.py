"""Parquet files of strangers: opened without running anything that they bring along.

An Arrow extension type is rebuilt by whatever class is registered under its name, from bytes in the file; Ray Data
registers one whose values are pickles, older versions of pyarrow and Ray unpickled the types themselves. So a file that
holds such types is refused before Arrow builds its schema.
"""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayllm.core.errors import DataError

_MAGIC = b"PAR1"
_EXTENSION_KEY = b"ARROW:extension:name"  # what names a field's extension type in the Arrow schema


def _in_base64(text: bytes) -> tuple[bytes, ...]:
    """What every base64 of something that holds `text` holds: one of three, by the place of `text` modulo 3."""
    encoded = [base64.b64encode(bytes(shift) + text)[: (shift + len(text)) * 8 // 6] for shift in range(3)]
    return tuple(whole[-(-shift * 8 // 6) :] for shift, whole in enumerate(encoded))


_EXTENSION_KEY_IN_BASE64 = _in_base64(_EXTENSION_KEY)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Mapped into memory, checksums of pages verified where the file has them. DataError if it is damaged or holds
    extension types."""
    with readable(path):
        # Arrow builds its schema, which the footer holds in base64, as soon as it opens the file
        footer = _footer(path)
        if any(key in footer for key in _EXTENSION_KEY_IN_BASE64):
            raise _extension_error(path)
        file = pq.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
        if any(_is_extension(field.type) for field in file.schema_arrow):
            raise _extension_error(path)
        return file


def _footer(path: Path) -> bytes:
    """As it is in the file (apache/parquet-format): the footer, its length in 4 bytes, the magic number."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        end = file.read()
        length = int.from_bytes(end[:4], "little") + 8
        if len(end) < 8 or end[4:] != _MAGIC or length > size:
            raise DataError(f"{path}: cannot be read: is no Parquet file, or not all of one")
        file.seek(size - length)
        return file.read(length - 8)


def column_names(file: pq.ParquetFile) -> list[str]:
    return list(file.schema_arrow.names)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What Arrow raises as it reads becomes a DataError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path}: cannot be read: {reason[0]}") from error


def _extension_error(path: Path) -> DataError:
    return DataError(
        f"{path}: holds columns of an Arrow extension type, which only code that the file names can read; "
        "write them as plain columns"
    )


def _is_extension(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if pa.types.is_dictionary(kind):
        return _is_extension(kind.value_type)
    return any(_is_extension(kind.field(index).type) for index in range(kind.num_fields))
