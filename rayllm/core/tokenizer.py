"""Text to token ids and back, as the checkpoint's own tokenizer does it.

transformers finds and reads the tokenizer's files and renders its chat template; encoding and decoding go straight
to the Rust tokenizer underneath, which may be shared between threads. Nothing is ever downloaded here, and no code of
a checkpoint is run: its template renders in jinja's sandbox.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from rayllm.core.errors import CheckpointError, InvalidRequestError
from rayllm.core.token_bytes import TokenBytes
from rayllm.core.types import check_utf8

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Tokenizer:
    """`Tokenizer.load` makes one; the instance does not change afterwards."""

    def __init__(self, transformers_tokenizer: Any, *, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = transformers_tokenizer
        self._backend = transformers_tokenizer.backend_tokenizer
        # transformers sets these on every call and a concurrent call would fail; nobody here cuts or pads.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bytes = TokenBytes(self._backend)
        self.eos_token_ids = eos_token_ids
        self.bos_token_id: int | None = transformers_tokenizer.bos_token_id
        self.eos_token_id: int | None = transformers_tokenizer.eos_token_id  # the tokenizer's own, of `eos_token_ids`
        self.vocab_size: int = len(transformers_tokenizer)
        self.has_chat_template: bool = transformers_tokenizer.chat_template is not None

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """CheckpointError if the directory holds no tokenizer that can be read without running its code."""
        from transformers import AutoTokenizer  # seconds to import, so only when needed

        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(directory, "is not a directory")
        eos_token_ids = _eos_token_ids(directory)
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of all kinds; for a damaged tokenizer.json the tokenizers library has no other
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(directory, f"the tokenizer cannot be loaded: {reason[0]}") from error
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise CheckpointError(directory, "the tokenizer is not one of the tokenizers library (tokenizer.json)")
        if tokenizer.eos_token_id is not None:
            eos_token_ids.add(tokenizer.eos_token_id)
        return cls(tokenizer, eos_token_ids=frozenset(eos_token_ids))

    @cached_property
    def max_chars_per_token(self) -> int:
        """No token of a text stands for more characters, except for what a normalizer drops (it is doubled for that).

        So a text longer than this times a number of tokens cannot fit in them, which is known without tokenizing it.
        """
        return 2 * max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, *, add_special_tokens: bool = True, field: str = "prompt") -> list[int]:
        """Raises as `check_text`."""
        check_text(text, field)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD.

        Spaces before punctuation stay even if the tokenizer's configuration would clean them up: the model wrote them.
        """
        return self.bytes.join(token_ids, skip_special_tokens=skip_special_tokens).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; for byte-level vocabularies perhaps a part of a character."""
        return self.bytes.of(token_id)

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """The token ids of a conversation, by the tokenizer's own template, which adds the special tokens itself.

        InvalidRequestError if there is no template or it refuses the messages (their roles or their order).
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False, field="messages")

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text that `chat` encodes. Raises as `chat`."""
        self._check_messages(messages)
        with _refusals():
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, tokenize=False
            )
        return text

    def generation_spans(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[int, int]] | None:
        """Which characters of the conversation, rendered without a generation prompt, the template itself marks as
        what the model writes (`{% generation %}`): [first, last), in order. None if it marks nothing in any
        conversation. Raises as `chat`.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        self._check_messages(messages)
        template = self._tokenizer.get_chat_template()
        if _GENERATION_BLOCK.search(template) is None:
            return None
        with _refusals():
            _, spans = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        return [(first, last) for first, last in spans[0]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that turns a text into token ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    @property
    def template_fingerprint(self) -> str | None:
        """SHA-256 of the chat template; None without one."""
        if not self.has_chat_template:
            return None
        return hashlib.sha256(self._tokenizer.get_chat_template().encode()).hexdigest()

    def _check_messages(self, messages: Sequence[Mapping[str, str]]) -> None:
        if not self.has_chat_template:
            raise InvalidRequestError("messages", "this model has no chat template; use a completion instead")
        if not messages:
            raise InvalidRequestError("messages", "is empty")


@contextmanager
def _refusals() -> Iterator[None]:
    """What a chat template raises becomes an InvalidRequestError."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidRequestError("messages", f"the model's chat template refuses them: {error}") from error


def check_text(text: str, field: str) -> None:
    """InvalidRequestError names `field` for NUL and for lone surrogates."""
    if "\0" in text:
        raise InvalidRequestError(field, f"holds a NUL character at position {text.index(chr(0))}")
    check_utf8(field, text)


def _eos_token_ids(directory: Path) -> set[int]:
    """What the model's two configurations call an end of sequence; they differ, and instruction models need both."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(path, "is not a JSON object") from error
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
            raise CheckpointError(path, f"eos_token_id: {value!r} is not a token id")
        found.update(ids)
    return found
