"""Token ids to text while they are generated.

Each token is turned into bytes once, so a sequence costs time proportional to its length, not to its square. Knows
nothing of sampling or of how a sequence ends otherwise than by a stop string.
"""

from collections.abc import Sequence

from rayllm.core.tokenizer import Tokenizer

_LONGEST_UTF8 = 4  # bytes of a character


class Detokenizer:
    """All that `push` and `finish` return, joined, is what the output ids add to the text of the prompt.

    That is `decode(prompt + output)` without the text that the prompt alone had completed; a character that the prompt
    left half written belongs to the output. Text is returned as soon as no further token can change it: half a
    character waits for its rest, and what may be the start of a stop string waits until it is known to be none. Bytes
    become U+FFFD once they cannot be UTF-8 any more. Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._bytes = tokenizer.bytes
        self._open = b""  # the first bytes of a character that is not complete
        self._stop = StopStrings(stop)
        self._strip_next = self._bytes.starts_stripped
        self._start_after(prompt_token_ids)

    @property
    def stopped_by(self) -> str | None:
        """The stop string found, once there is one; the text ends before it and further tokens are ignored."""
        return self._stop.found

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make final, perhaps none."""
        joined = self._open + self._text_bytes(token_ids)
        complete = len(joined) - _open_length(joined)
        self._open = joined[complete:]
        return self._stop.feed(joined[:complete].decode(errors="replace"))

    def finish(self) -> str:
        """What was held back, at the end of the sequence; nothing after a stop string."""
        rest, self._open = self._open.decode(errors="replace"), b""
        return self._stop.feed(rest) + self._stop.flush()

    def _text_bytes(self, token_ids: Sequence[int]) -> bytes:
        tokens = self._bytes
        joined = b"".join(tokens.of(token_id) for token_id in token_ids if not tokens.is_special(token_id))
        if self._strip_next and joined:
            self._strip_next = False
            return joined.removeprefix(b" ")
        return joined

    def _start_after(self, prompt_token_ids: Sequence[int]) -> None:
        """Only the last few bytes of the prompt matter; and whether it had any, for the space at the very start."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if not self._bytes.is_special(token_id):
                tail = self._bytes.of(token_id) + tail
            if len(tail) >= _LONGEST_UTF8:
                break
        if tail:
            self._strip_next = False
            self._open = tail[len(tail) - _open_length(tail) :]


def _open_length(text: bytes) -> int:
    """How many bytes at the end are the beginning of a character; not counted once it cannot become one.

    codecs' incremental decoder would do but for surrogates (ED A0..BF), whose two bytes it keeps back in vain.
    """
    for length in range(1, min(len(text) + 1, _LONGEST_UTF8)):
        if text[-length] < 0x80:
            return 0
        if text[-length] >= 0xC0:  # the first byte of a character
            try:
                text[-length:].decode()
            except UnicodeDecodeError as error:
                return length if error.reason == "unexpected end of data" else 0
            return 0
    return 0


class StopStrings:
    """Finds the stop string that ends first in a text that comes in pieces, however it is cut into pieces.

    Of several that end at the same character the longest counts. Each string is an automaton of Knuth, Morris and
    Pratt (1977): a constant number of steps for a character on average, and its state is the length of the text's
    longest suffix that may become a match, which is what must be held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._patterns = sorted(set(stop), key=len, reverse=True)
        self._failures = [_failure_function(pattern) for pattern in self._patterns]
        self._matched = [0] * len(self._patterns)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is certainly not part of a stop string; nothing any more after one was found."""
        if self.found is not None:
            return ""
        if not self._patterns:
            return text
        self._held += text
        start = len(self._held) - len(text)
        for position in range(start, len(self._held)):
            if (pattern := self._step(self._held[position])) is not None:
                self.found = pattern
                before, self._held = self._held[: position + 1 - len(pattern)], ""
                return before
        settled = len(self._held) - max(self._matched)
        before, self._held = self._held[:settled], self._held[settled:]
        return before

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Advances every automaton; the longest pattern that is now complete."""
        complete = None
        for index, pattern in enumerate(self._patterns):
            failure = self._failures[index]
            matched = self._matched[index]
            while matched and pattern[matched] != character:
                matched = failure[matched - 1]
            if pattern[matched] == character:
                matched += 1
            self._matched[index] = matched
            if matched == len(pattern) and complete is None:
                complete = pattern
        return complete


def _failure_function(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    failure = [0] * len(pattern)
    matched = 0
    for index in range(1, len(pattern)):
        while matched and pattern[index] != pattern[matched]:
            matched = failure[matched - 1]
        if pattern[index] == pattern[matched]:
            matched += 1
        failure[index] = matched
    return failure
