"""The bytes that each token of a vocabulary stands for.

Text is the bytes of its tokens joined and decoded as UTF-8 at the end; a token alone may be half a character. This
holds for byte-level BPE (GPT-2, Llama 3, Qwen) and for SentencePiece vocabularies with byte fallback (Llama 2,
Mistral), the two kinds that decoder-only models use. Knows nothing of encoding.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayllm.core.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Reads the decoder of a `tokenizer.json`; CheckpointError if it is of another kind.

    `starts_stripped`: the text of a whole sequence loses one leading space, which SentencePiece added in encoding.
    """

    def __init__(self, backend: "Backend") -> None:
        self._backend = backend
        self._special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._convert, self.starts_stripped = _compile(_decoder_steps(backend))
        self._cache: dict[int, bytes] = {}

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def of(self, token_id: int) -> bytes:
        """Empty for an id that the vocabulary does not have (models pad their embedding)."""
        found = self._cache.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id)
            found = self._cache[token_id] = b"" if token is None else self._convert(token)
        return found

    def join(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> bytes:
        """The bytes of a whole sequence, its leading space stripped where that is due."""
        skipped = self._special_ids if skip_special_tokens else ()
        joined = b"".join(self.of(token_id) for token_id in token_ids if token_id not in skipped)
        return joined[1:] if self.starts_stripped and joined.startswith(b" ") else joined


def _decoder_steps(backend: "Backend") -> list[dict[str, Any]]:
    decoder = backend.decoder
    if decoder is None:
        raise CheckpointError("tokenizer.json", "has no decoder")
    outer = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = outer["decoders"] if outer["type"] == "Sequence" else [outer]
    return steps


def _compile(steps: list[dict[str, Any]]) -> tuple[Callable[[str], bytes], bool]:
    """From the decoder's steps: token -> bytes, and whether the sequence's first space is dropped."""
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(_bytes_by_character()), False
    replacements: list[tuple[str, str]] = []
    byte_fallback = starts_stripped = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not byte_fallback:
                replacements.append((old, new))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass  # joining is what we do anyway
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if "Fuse" in kinds[: kinds.index("Strip")]:
                starts_stripped = True
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": scheme} if len(steps) == 1:
                replacements.append((mark, " "))
                starts_stripped = scheme != "never"
            case _:
                raise CheckpointError("tokenizer.json", f"a decoder of type {' + '.join(kinds)} is not supported")
    return _sentencepiece(replacements, byte_fallback), starts_stripped


def _byte_level(table: Mapping[str, int]) -> Callable[[str], bytes]:
    def convert(token: str) -> bytes:
        try:
            return bytes([table[character] for character in token])
        except KeyError:
            return token.encode()  # an added token, spelled as it is

    return convert


def _sentencepiece(replacements: Sequence[tuple[str, str]], byte_fallback: bool) -> Callable[[str], bytes]:
    def convert(token: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return convert


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 is itself, the rest follow from U+0100 (Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
