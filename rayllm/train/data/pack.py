"""Files of texts, conversations, preference pairs or prompts to a packed data set: a directory, whole or not there.

Every file is read and checked before the first worker starts. Rows keep their order, so the same files give the same
data set, whatever runs them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa

from rayllm.core.errors import ConfigError, DataError
from rayllm.core.tokenizer import Tokenizer
from rayllm.models.cache import publish
from rayllm.train.data.info import DatasetInfo, SourceInfo, write_info
from rayllm.train.data.packing import BestFitPacker, ConcatPacker
from rayllm.train.data.ray_map import tokenize_all
from rayllm.train.data.rows import Kind
from rayllm.train.data.shards import UNCUT_SCHEMAS
from rayllm.train.data.sources import Chunk, Source, check_source, find_files
from rayllm.train.data.writing import PackedWriting, UncutWriting, Writing

Tokenize = Callable[[Sequence[Chunk], Kind, str], Iterator[tuple[Chunk, pa.Table]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSettings:
    """`sequence_length`: of a row, in tokens; of pairs the longest prompt with an answer, of prompts the longest.
    `drop_long`: leave longer ones out, which are an error otherwise. ConfigError if they cannot work."""

    kind: Kind
    sequence_length: int
    drop_long: bool = False

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length: {self.sequence_length} is too short; at least 2 tokens")
        if self.drop_long and self.kind not in UNCUT_SCHEMAS:
            raise ConfigError("drop_long: only pairs and prompts are dropped; longer documents go on in the next row")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Files that were read whole and found sound, and all else that packing needs."""

    output: Path
    tokenizer_directory: Path
    tokenizer: Tokenizer
    settings: PackSettings
    sources: tuple[Source, ...]

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)


def prepare(inputs: Sequence[Path], output: Path, tokenizer_directory: Path, settings: PackSettings) -> Prepared:
    """ConfigError if `output` is there or the tokenizer cannot serve; DataError names the file and row at fault."""
    if output.exists():
        raise ConfigError(f"{output} is there already; name a directory to be made")
    return Prepared(
        output=output,
        tokenizer_directory=tokenizer_directory,
        tokenizer=_usable_tokenizer(tokenizer_directory, settings.kind),
        settings=settings,
        sources=tuple(check_source(path, settings.kind) for path in find_files(inputs)),
    )


def pack(
    prepared: Prepared, *, on_rows: Callable[[int], None] = lambda rows: None, tokenize: Tokenize = tokenize_all
) -> DatasetInfo:
    """`on_rows` is told of the rows that are done. DataError names the row that the tokenizer or its template refuses,
    or of which nothing would be learnt."""
    settings, tokenizer = prepared.settings, prepared.tokenizer
    chunks = [chunk for source in prepared.sources for chunk in source.chunks]
    sources = _describe_sources(prepared.sources)
    first_documents = {source.path: source.first_document for source in sources}
    with publish(prepared.output.absolute()) as directory:
        writing = _writing(directory, tokenizer, settings)
        for chunk, table in tokenize(chunks, settings.kind, str(prepared.tokenizer_directory.absolute())):
            _check_problems(table)
            writing.add(chunk.path, first_documents[chunk.path], table)
            on_rows(table.num_rows)
        info = DatasetInfo(
            kind=settings.kind,
            sequence_length=settings.sequence_length,
            tokenizer=str(prepared.tokenizer_directory),
            tokenizer_sha256=tokenizer.fingerprint,
            template_sha256=None if settings.kind is Kind.TEXT else tokenizer.template_fingerprint,
            vocab_size=tokenizer.vocab_size,
            pad_token_id=_pad_token_id(tokenizer),
            sources=sources,
            **writing.finish(),
        )
        if info.num_rows == 0:
            raise DataError(f"{sources[0].path}: every row is empty or was dropped, so there is nothing to learn")
        write_info(directory, info)
    return info


def _writing(directory: Path, tokenizer: Tokenizer, settings: PackSettings) -> Writing:
    length = settings.sequence_length
    if settings.kind in UNCUT_SCHEMAS:
        return UncutWriting(directory, settings.kind, sequence_length=length, drop_long=settings.drop_long)
    packer = BestFitPacker if settings.kind is Kind.CHAT else ConcatPacker
    return PackedWriting(directory, packer(length, pad_token_id=_pad_token_id(tokenizer)), sequence_length=length)


def _usable_tokenizer(directory: Path, kind: Kind) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    if kind is Kind.CHAT and not tokenizer.has_chat_template:
        raise ConfigError(f"{directory}: has no chat template, which conversations need; name another --tokenizer")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{directory}: names no end-of-sequence token (eos_token), so a model could not learn where to stop"
        )
    return tokenizer


def _pad_token_id(tokenizer: Tokenizer) -> int:
    """Padding is never learnt and never attended to, so any token serves; all tokenizers here have this one."""
    assert tokenizer.eos_token_id is not None
    return tokenizer.eos_token_id


def _describe_sources(sources: Sequence[Source]) -> tuple[SourceInfo, ...]:
    firsts = accumulate((source.num_rows for source in sources), initial=0)
    return tuple(
        SourceInfo(path=source.path, sha256=source.sha256, num_rows=source.num_rows, first_document=first)
        for source, first in zip(sources, firsts, strict=False)
    )


def _check_problems(table: pa.Table) -> None:
    problem = next((text for text in table["problem"].to_pylist() if text is not None), None)
    if problem is not None:
        raise DataError(problem)
