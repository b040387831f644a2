"""Training data as `rayllm data pack` writes it, but by this process alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayllm.train.data.pack import PackSettings, pack, prepare
from rayllm.train.data.rows import Kind
from rayllm.train.data.tokenize import tokenize_chunk


def pack_rows(folder: Path, tokenizer: Path, kind: Kind, rows: Sequence[dict[str, Any]], length: int) -> Path:
    """-> the packed data set, in `folder`, in rows of `length` tokens."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PackSettings(kind=kind, sequence_length=length)
    pack(
        prepare([folder / "rows.jsonl"], folder / "packed", tokenizer, settings),
        tokenize=lambda chunks, *rest: ((c, table) for c in chunks for table in tokenize_chunk(c, *rest)),
    )
    return folder / "packed"


def seven_pairs(folder: Path, tokenizer: Path, length: int) -> Path:
    """So that a step of four pairs ends in the next epoch; of very different lengths."""
    rows = [
        {"prompt": "and " * (n % 3) + f"the {n}", "chosen": " cat" * (n % 4 + 1), "rejected": f" dog {n}" * (3 - n % 3)}
        for n in range(7)
    ]
    return pack_rows(folder, tokenizer, Kind.PREFERENCE, rows, length)
