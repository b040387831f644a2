"""What one row of a training set says, whatever kind of file it came from: checked, typed, not yet tokens.

text         {"text": "..."}                                    a document
chat         {"messages": [{"role": ..., "content": ...}, ...]} a conversation
preference   {"prompt": ..., "chosen": ..., "rejected": ...}    three texts, or three lists of messages
prompt       {"prompt": ...}                                    a text, or a list of messages, to be answered

Knows nothing of files and tokenizers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rayllm.core.errors import DataError, InvalidRequestError
from rayllm.core.tokenizer import check_text

Message = Mapping[str, str]
Turns = str | tuple[Message, ...]


class Kind(Enum):
    TEXT = "text"
    CHAT = "chat"
    PREFERENCE = "preference"
    PROMPT = "prompt"

    @property
    def columns(self) -> tuple[str, ...]:
        return _COLUMNS[self]


_COLUMNS = {
    Kind.TEXT: ("text",),
    Kind.CHAT: ("messages",),
    Kind.PREFERENCE: ("prompt", "chosen", "rejected"),
    Kind.PROMPT: ("prompt",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRow:
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRow:
    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceRow:
    """Three texts, or three lists of messages: `chosen` and `rejected` are what follows `prompt`, without it."""

    prompt: Turns
    chosen: Turns
    rejected: Turns


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    prompt: Turns


Row = TextRow | ChatRow | PreferenceRow | PromptRow


def parse_row(row: Mapping[str, Any], kind: Kind) -> Row:
    """DataError says what is wrong; where the row lies is for the caller to say. Other columns are not looked at."""
    for column in kind.columns:
        if column not in row:
            raise DataError(f"has no column {column}; it has {', '.join(row) or 'none'}")
    if kind is Kind.TEXT:
        return TextRow(text=_text(row["text"], "text"))
    if kind is Kind.CHAT:
        messages = _messages(row["messages"], "messages")
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError("messages: none is the assistant's, so there is nothing to learn")
        return ChatRow(messages=messages)
    if kind is Kind.PROMPT:
        return PromptRow(prompt=_turns(row["prompt"], "prompt"))
    prompt, chosen, rejected = (_turns(row[column], column) for column in kind.columns)
    if len({isinstance(turns, str) for turns in (prompt, chosen, rejected)}) > 1:
        raise DataError("prompt, chosen and rejected must be three texts or three lists of messages")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(turns, str) and turns[-1]["role"] != "assistant":
            raise DataError(f"{name}: the last message must be the assistant's")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same, so there is nothing to prefer")
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected)


def _turns(value: Any, name: str) -> Turns:
    return _text(value, name) if isinstance(value, str) else _messages(value, name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: is {_type(value)}, not a text")
    try:
        check_text(value, name)
    except InvalidRequestError as error:
        raise DataError(str(error)) from None
    return value


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{name}: is {_type(value)}, not a list of messages")
    if not value:
        raise DataError(f"{name}: is an empty list")
    return tuple(_message(message, f"{name}[{index}]") for index, message in enumerate(value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{name}: is {_type(value)}, not a message with role and content")
    message = {}
    for field in ("role", "content"):
        if value.get(field) is None:
            raise DataError(f"{name}: has no {field}")
        message[field] = _text(value[field], f"{name}.{field}")
    # Parquet gives every message all fields that any has, as nulls
    unknown = [field for field, content in value.items() if content is not None and field not in message]
    if unknown:
        raise DataError(f"{name}: has {', '.join(map(str, unknown))}; only role and content can be learnt from")
    return message


def _type(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
