"""Log-probabilities in OpenAI's two shapes: one object for each token (chat), parallel lists (completions).

A token need not be valid UTF-8 on its own. Chat carries its bytes beside the text; completions write such a token as
`bytes:\\xNN`, so that no two tokens look the same.
"""

from collections.abc import Sequence
from typing import Any

from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import TokenLogprobs

# JSON has no infinity; OpenAI's stand-in for an impossible token.
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    content = []
    for position in logprobs:
        entry = _chat_token(tokenizer, position.token_id, position.logprob)
        entry["top_logprobs"] = [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in position.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    *,
    text_offset: int,
) -> tuple[dict[str, Any], int]:
    """The lists for these tokens, and where the next token's text begins. None stands for the very first token, which
    nothing precedes."""
    tokens = [completion_token(tokenizer, token_id) for token_id in token_ids]
    top: list[dict[str, float] | None] = []
    offsets = []
    for token, position in zip(tokens, logprobs, strict=True):
        offsets.append(text_offset)
        text_offset += len(token)
        if position is None:
            top.append(None)
            continue
        alternatives = {completion_token(tokenizer, i): max(logprob, _LOWEST) for i, logprob in position.top}
        alternatives.setdefault(token, max(position.logprob, _LOWEST))
        top.append(alternatives)
    body = {
        "tokens": tokens,
        "token_logprobs": [None if each is None else max(each.logprob, _LOWEST) for each in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }
    return body, text_offset


def completion_token(tokenizer: Tokenizer, token_id: int) -> str:
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, _LOWEST), "bytes": list(raw)}
