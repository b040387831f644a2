"""From a row to token ids and which of them are learnt.

The tokens are those that serving would feed: texts with the special tokens that the tokenizer adds itself,
conversations by its chat template. Of a conversation the assistant's turns are learnt, each with the token that ends
it, or the model would never learn to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayllm.core.errors import DataError
from rayllm.core.tokenizer import Tokenizer
from rayllm.train.data.rows import ChatRow, Message, PreferenceRow, TextRow, Turns


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """`tokens` int32 and `mask` bool, of one length: mask says which tokens the one before it is to predict."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Token ids: what is read, and the two answers after it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def text_document(tokenizer: Tokenizer, row: TextRow) -> Document:
    """The text and the end of sequence after it; all of it is learnt but its first token, which nothing predicts."""
    ids = tokenizer.encode(row.text, field="text")
    assert tokenizer.eos_token_id is not None, "checked before any row is read"
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return _document(ids, [(1, len(ids))])


def chat_document(tokenizer: Tokenizer, row: ChatRow) -> Document:
    """DataError if the template does not let the assistant's turns be told from the rest, or nothing is learnt."""
    spans = tokenizer.generation_spans(row.messages)
    if spans is None:
        spans = _turn_spans(tokenizer, row.messages)
    text = tokenizer.render_chat(row.messages, add_generation_prompt=False)
    ids, bounds = _encode_spans(tokenizer, text, spans)
    document = _document(ids, [_to_end_of_turn(tokenizer, ids, first, last) for first, last in bounds])
    if not document.mask.any():
        raise DataError("messages: the chat template gives the assistant no tokens, so there is nothing to learn")
    return document


def preference_pair(tokenizer: Tokenizer, row: PreferenceRow) -> Pair:
    """Both answers follow the same tokens, those of the prompt alone, as serving would feed them, and end as a turn
    does: texts with the end of sequence, conversations as the template has it."""
    prompt = prompt_tokens(tokenizer, row.prompt)
    chosen, rejected = (_answer(tokenizer, row.prompt, prompt, turns) for turns in (row.chosen, row.rejected))
    if chosen == rejected:
        raise DataError("chosen and rejected give the same tokens, so there is nothing to prefer")
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected)


def prompt_tokens(tokenizer: Tokenizer, prompt: Turns) -> list[int]:
    """What serving would feed before an answer. DataError where that is nothing."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)
    if not ids:
        raise DataError("prompt: gives no tokens")
    return ids


def _answer(tokenizer: Tokenizer, prompt: Turns, prompt_ids: list[int], answer: Turns) -> list[int]:
    if isinstance(prompt, str) or isinstance(answer, str):
        assert isinstance(prompt, str), "checked when the row was parsed"
        assert isinstance(answer, str), "checked when the row was parsed"
        assert tokenizer.eos_token_id is not None, "checked before any row is read"
        joint = tokenizer.encode(prompt + answer)
        ids = _after(tokenizer, prompt_ids, joint, answer)
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    before = tokenizer.render_chat(prompt)
    whole = tokenizer.render_chat([*prompt, *answer], add_generation_prompt=False)
    if not whole.startswith(before):
        raise DataError("prompt: the chat template renders it otherwise when an answer follows")
    joint = tokenizer.encode(whole, add_special_tokens=False, field="messages")
    ids = _after(tokenizer, prompt_ids, joint, whole[len(before) :])
    return ids[: _end_of_turn(tokenizer, ids, 0, len(ids))]


def _after(tokenizer: Tokenizer, prompt_ids: list[int], joint: list[int], answer: str) -> list[int]:
    """The answer's part of what both texts are together, or its own ids where a token would lie on both sides."""
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    return tokenizer.encode(answer, add_special_tokens=False, field="answer")


def _turn_spans(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """The assistant's turns as characters of the rendered conversation: what each adds to the conversation before it
    with the prompt to answer."""
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DataError("messages[0]: the conversation cannot begin with the assistant")
        before = tokenizer.render_chat(messages[:index])
        through = tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
        if not (through.startswith(before) and whole.startswith(through)):
            raise DataError(
                f"messages[{index}]: the chat template renders a turn otherwise when others follow, so what the "
                "assistant wrote cannot be found; give the tokenizer a template with {% generation %} blocks"
            )
        spans.append((len(before), len(through)))
    return spans


def _encode_spans(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of `text`, and where the spans of characters lie in them.

    The text is encoded in one piece, but cut where a token would lie on both sides of a span's end: there the ids
    before the cut are those that serving feeds.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, field="messages")
    places = {0: 0, len(text): len(ids)}
    cut_char, cut_token = 0, 0  # up to here the ids are settled
    for char in sorted({char for span in spans for char in span} - places.keys()):
        head = tokenizer.encode(text[cut_char:char], add_special_tokens=False, field="messages")
        if ids[cut_token : cut_token + len(head)] != head:
            tail = tokenizer.encode(text[char:], add_special_tokens=False, field="messages")
            ids = [*ids[:cut_token], *head, *tail]
            cut_char, cut_token = char, cut_token + len(head)
            places[char] = cut_token
        else:
            places[char] = cut_token + len(head)
    places[len(text)] = len(ids)
    return ids, [(places[first], places[last]) for first, last in spans]


def _to_end_of_turn(tokenizer: Tokenizer, ids: Sequence[int], first: int, last: int) -> tuple[int, int]:
    """The span without what comes after the turn's end (a line feed, say), or with the end, where it came next."""
    if ids[last : last + 1] and ids[last] in tokenizer.eos_token_ids:
        return first, last + 1
    return first, _end_of_turn(tokenizer, ids, first, last)


def _end_of_turn(tokenizer: Tokenizer, ids: Sequence[int], first: int, last: int) -> int:
    ends = [place for place in range(first, last) if ids[place] in tokenizer.eos_token_ids]
    return ends[-1] + 1 if ends else last


def _document(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Document:
    mask = np.zeros(len(ids), dtype=np.bool_)
    for first, last in spans:
        mask[first:last] = True
    mask[:1] = False
    return Document(tokens=np.array(ids, dtype=np.int32), mask=mask)
