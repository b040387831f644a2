"""`rayllm data show`: a packed data set as the model will see it."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayllm.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

    from rayllm.core.tokenizer import Tokenizer
    from rayllm.train.data.dataset import PackedDataset

EXAMPLES = """
Example: `rayllm data show packed --rows 3`
"""
_MASKED, _LEARNT, _MARK = "dim", "bold green", "cyan"


def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `rayllm data pack` made.")],
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="How many rows, pairs or prompts.", min=1)] = 2,
    first: Annotated[int, typer.Option("--first", metavar="I", help="The first of them, from 0.", min=0)] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="MODEL", help="Where the tokenizer lies now [where it lay]."),
    ] = None,
) -> None:
    """Print rows of a packed data set: every token, those that are not learnt dimmed, documents set apart.

    Tokens are decoded one by one, special ones as they are written; <0xE2> is a byte of a character that several tokens
    make. A mark before each document says which row of which file it was. Of a pair the prompt is there once, but for
    its last token, after which both answers begin.
    """
    from rich.console import Console

    from rayllm.core.tokenizer import Tokenizer
    from rayllm.models.hub import resolve_model
    from rayllm.train.data.dataset import PackedDataset
    from rayllm.train.data.rows import Kind

    dataset = PackedDataset(directory)
    if first >= len(dataset):
        raise ConfigError(f"--first: {first} is none of the {len(dataset)} rows")
    named = tokenizer or dataset.info.tokenizer
    loaded = Tokenizer.load(Path(named) if Path(named).is_dir() else resolve_model(named))
    dataset.check_tokenizer(loaded)
    console = Console(soft_wrap=True, highlight=False)
    render = {Kind.PREFERENCE: _pair, Kind.PROMPT: _prompt}.get(dataset.kind, _row)
    for sample in range(first, min(first + rows, len(dataset))):
        for line in render(dataset, sample, loaded):
            console.print(line)


def _row(dataset: "PackedDataset", sample: int, tokenizer: "Tokenizer") -> Iterator["Text"]:
    row = dataset.row(sample)
    learnt, used = int(row.mask.sum()), sum(row.document_lengths)
    yield _mark(f"row {sample}: {used} tokens of {len(row.document_lengths)} documents, {learnt} learnt")
    start = 0
    for length, number, offset in zip(row.document_lengths, row.document_ids, row.document_offsets, strict=True):
        goes_on = f", from its token {offset} on" if offset else ""
        yield _mark(f"document {number}{goes_on} ({dataset.info.place_of(number)})")
        piece = slice(start, start + length)
        yield _tokens(tokenizer, row.tokens[piece].tolist(), row.mask[piece].tolist())
        start += length
    if used < len(row.tokens):
        yield _mark(f"padding: {len(row.tokens) - used} tokens")


def _pair(dataset: "PackedDataset", sample: int, tokenizer: "Tokenizer") -> Iterator["Text"]:
    batch = dataset.micro_batch([sample])
    ids, mask = batch.token_ids[0].tolist(), batch.loss_mask[0].tolist()
    yield _mark(f"pair {sample}: {len(ids)} tokens, {batch.num_targets} learnt")
    for name, prefix, (start, stop) in zip(
        ("chosen", "rejected"), batch.prefixes, pairwise(batch.cu_seqlens), strict=True
    ):
        after = f", after the first {prefix} above" if prefix else ""
        yield _mark(f"{name}: {stop - start} tokens{after}")
        yield _tokens(tokenizer, ids[start:stop], mask[start:stop])


def _prompt(dataset: "PackedDataset", sample: int, tokenizer: "Tokenizer") -> Iterator["Text"]:
    prompt = dataset.prompt(sample)
    yield _mark(f"prompt {sample}: {len(prompt)} tokens")
    yield _tokens(tokenizer, prompt, [False] * len(prompt))


def _mark(text: str) -> "Text":
    from rich.text import Text

    return Text(f"── {text}", style=_MARK)


def _tokens(tokenizer: "Tokenizer", ids: Iterable[int], mask: Iterable[bool]) -> "Text":
    """Control characters of the data are shown, not sent to the terminal."""
    from rich.text import Text

    text = Text()
    for token_id, is_learnt in zip(ids, mask, strict=True):
        text.append(_visible(tokenizer.token_bytes(token_id)), style=_LEARNT if is_learnt else _MASKED)
    return text


def _visible(token: bytes) -> str:
    try:
        decoded = token.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" if byte >= 0x80 else chr(byte) for byte in token)
    return "".join(char if char.isprintable() or char == "\n" else f"<0x{ord(char):02X}>" for char in decoded)
