"""From what a client sends as a prompt to token ids, checked before anything grows with its size."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rayllm.core.errors import InvalidRequestError
from rayllm.core.limits import ModelLimits
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import SamplingParams

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 4096

# Tokenizing this many characters takes about a millisecond; more than that is done off the event loop.
_INLINE_CHARS = 8192


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages of {"role", "content"}, to be rendered by the model's own chat template."""

    messages: tuple[Mapping[str, str], ...]


Prompt = str | Sequence[int] | Chat


class PromptEncoder:
    def __init__(self, tokenizer: Tokenizer, limits: ModelLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_chars = tokenizer.max_chars_per_token * limits.max_model_len

    async def encode(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """Raises InvalidRequestError naming `prompt`, `messages` or the sampling parameter that does not fit."""
        if isinstance(prompt, Chat):
            token_ids: Sequence[int] = await self.encode_chat(prompt)
        elif isinstance(prompt, str):
            token_ids = await self.encode_text(prompt, field="prompt")
        else:
            token_ids = prompt
        try:
            self._limits.check(token_ids, params)
        except InvalidRequestError as error:
            if isinstance(prompt, Chat) and error.field == "prompt":
                raise InvalidRequestError("messages", error.problem) from None
            raise
        return tuple(token_ids)

    async def encode_text(self, text: str, *, field: str, add_special_tokens: bool = True) -> list[int]:
        if not text:
            raise InvalidRequestError(field, "is empty")
        self._check_chars(field, len(text))
        encode = partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens, field=field)
        return encode() if len(text) <= _INLINE_CHARS else await asyncio.to_thread(encode)

    async def encode_chat(self, chat: Chat) -> list[int]:
        if not chat.messages:
            raise InvalidRequestError("messages", "is empty")
        if len(chat.messages) > MAX_MESSAGES:
            raise InvalidRequestError("messages", f"{len(chat.messages)} messages, at most {MAX_MESSAGES} are allowed")
        chars = 0
        messages = []
        for i, message in enumerate(chat.messages):
            if message["role"] not in ROLES:
                raise InvalidRequestError(f"messages[{i}].role", f"must be one of {', '.join(ROLES)}")
            chars += len(message["content"])
            # "developer" is the newer name of the same thing; chat templates know only the older one.
            role = "system" if message["role"] == "developer" else message["role"]
            messages.append({"role": role, "content": message["content"]})
        self._check_chars("messages", chars)
        if chars <= _INLINE_CHARS:
            return self._tokenizer.chat(messages)
        return await asyncio.to_thread(self._tokenizer.chat, messages)

    def decode(self, token_ids: Sequence[int], *, field: str) -> str:
        for token_id in token_ids:
            if not 0 <= token_id < self._limits.vocab_size:
                raise InvalidRequestError(field, f"{token_id} is not in the vocabulary of {self._limits.vocab_size}")
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _check_chars(self, field: str, chars: int) -> None:
        if chars > self._max_chars:
            raise InvalidRequestError(
                field,
                f"{chars} characters cannot fit the context of {self._limits.max_model_len} tokens",
            )
