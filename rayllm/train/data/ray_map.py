"""The chunks of all files over the workers of a Ray cluster, by Ray Data: streaming, and in the order of the files.

The only file of the data sets that knows Ray. On a cluster, files and tokenizer must lie where every node sees them.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from rayllm.core.errors import DataError
from rayllm.train.data.rows import Kind
from rayllm.train.data.sources import Chunk
from rayllm_cluster.session import Session

# Small against the object store of a session of our own; more blocks than that wait on the workers.
_BLOCK_BYTES = 4 << 20


def tokenize_all(chunks: Sequence[Chunk], kind: Kind, tokenizer_directory: str) -> Iterator[tuple[Chunk, pa.Table]]:
    """What `tokenize_chunk` makes of each chunk, chunk after chunk. DataError if Ray cannot go on.

    Joins the Ray that is there or starts one of its own, which ends with the iterator.
    """
    with Session.start():
        import ray
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.target_max_block_size = _BLOCK_BYTES
        context.print_on_execution_start = False
        items = [{"chunk": number, **asdict(chunk)} for number, chunk in enumerate(chunks)]
        with ray.data.DataContext.current(context):  # a data set keeps the one that it is made in
            tokenized = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _tokenize,
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={"kind": kind.value, "tokenizer_directory": tokenizer_directory},
            )
        try:
            for table in tokenized.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from _by_chunk(table, chunks)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"tokenizing was cut off: {reason[-1]}") from error


def _tokenize(batch: pa.Table, *, kind: str, tokenizer_directory: str) -> Iterator[pa.Table]:
    from rayllm.train.data.tokenize import tokenize_chunk

    for item in batch.to_pylist():
        number = item.pop("chunk")
        for table in tokenize_chunk(Chunk(**item), Kind(kind), tokenizer_directory):
            yield table.append_column("chunk", pa.array([number] * table.num_rows, type=pa.int64()))


def _by_chunk(table: pa.Table, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, pa.Table]]:
    """Ray Data joins small tables into blocks."""
    numbers: Any = table["chunk"].to_numpy() if table.num_rows else ()
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[first]:
            yield chunks[numbers[first]], table.slice(first, place - first)
            first = place
