"""One chunk of a file to token ids: what a worker does. Knows no Ray.

What is wrong with a row comes back as a row of its own, its `problem`, and ends the chunk: it is the driver that fails,
once and with the first row that is wrong, whichever worker found it.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from rayllm.core.errors import DataError, InvalidRequestError
from rayllm.core.tokenizer import Tokenizer
from rayllm.train.data.documents import chat_document, preference_pair, prompt_tokens, text_document
from rayllm.train.data.rows import ChatRow, Kind, PreferenceRow, PromptRow, Row, TextRow
from rayllm.train.data.sources import Chunk, read_chunk

_BATCH_TOKENS = 1 << 18
_IDS = pa.list_(pa.int32())
_COMMON = [("index", pa.int64()), ("problem", pa.string())]
_DOCUMENT_SCHEMA = pa.schema([*_COMMON, ("tokens", _IDS), ("mask", pa.list_(pa.bool_()))])
_SCHEMAS = {
    Kind.TEXT: _DOCUMENT_SCHEMA,
    Kind.CHAT: _DOCUMENT_SCHEMA,
    Kind.PREFERENCE: pa.schema([*_COMMON, ("prompt", _IDS), ("chosen", _IDS), ("rejected", _IDS)]),
    Kind.PROMPT: pa.schema([*_COMMON, ("prompt", _IDS)]),
}


def tokenize_chunk(chunk: Chunk, kind: Kind, tokenizer_directory: str) -> Iterator[pa.Table]:
    """-> tables of `index`, the row's in its file, `problem`, and the ids: `tokens` and `mask`, both empty for an empty
    text; or `prompt`, with `chosen` and `rejected` where the row has answers."""
    tokenizer = _load(tokenizer_directory)
    schema = _SCHEMAS[kind]
    rows: list[dict[str, Any]] = []
    tokens = 0
    for located in read_chunk(chunk, kind):
        try:
            made = _tokenize(tokenizer, located.row)
        except (DataError, InvalidRequestError) as error:
            rows.append({"index": located.index, "problem": f"{chunk.path}, {located.place}: {error}"})
            break
        rows.append({"index": located.index, **made})
        tokens += sum(map(len, made.values()))
        if tokens >= _BATCH_TOKENS:
            yield pa.Table.from_pylist(rows, schema=schema)
            rows, tokens = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=schema)


def _tokenize(tokenizer: Tokenizer, row: Row) -> dict[str, Any]:
    if isinstance(row, PromptRow):
        return {"prompt": prompt_tokens(tokenizer, row.prompt)}
    if isinstance(row, PreferenceRow):
        pair = preference_pair(tokenizer, row)
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if isinstance(row, TextRow) and not row.text:
        return {"tokens": [], "mask": []}
    document = chat_document(tokenizer, row) if isinstance(row, ChatRow) else text_document(tokenizer, row)
    return {"tokens": document.tokens, "mask": document.mask}


@lru_cache(maxsize=1)
def _load(directory: str) -> Tokenizer:
    """Once in each worker process."""
    return Tokenizer.load(directory)
