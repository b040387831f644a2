"""The stream's pieces against the decoding of the whole, for any ids and any cutting into pushes."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayllm.core.tokenizer import Tokenizer
from rayllm.engine.detokenizer import Detokenizer, StopStrings

TEXTS = [
    "안녕하세요 세상, the cat",
    "👩‍👩‍👧 👍🏽 🇰🇷 mixed 글자 and é",
    "  leading and  double  spaces ",
    "\n\ttabs\r\n",
]
pieces = st.lists(st.integers(0, 420), max_size=8)


@pytest.fixture(scope="session")
def byte_level(byte_level_directory) -> Tokenizer:
    return Tokenizer.load(byte_level_directory)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_directory) -> Tokenizer:
    return Tokenizer.load(sentencepiece_directory)


def stream(tokenizer: Tokenizer, prompt: list[int], pushes: list[list[int]], stop: tuple[str, ...] = ()):
    detokenizer = Detokenizer(tokenizer, prompt, stop)
    texts = [detokenizer.push(push) for push in pushes]
    texts.append(detokenizer.finish())
    return texts, detokenizer.stopped_by


def added_text(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> str:
    """What the output adds to the prompt's text, from two whole decodings."""
    prompt_bytes = tokenizer.bytes.join(prompt, skip_special_tokens=True)
    for missing in range(4):  # a character that the prompt leaves open is not part of its text
        complete = prompt_bytes[: len(prompt_bytes) - missing]
        open_bytes = prompt_bytes[len(complete) :]
        if missing == 0 or _is_open(open_bytes):
            before = complete
    return tokenizer.decode(prompt + output)[len(before.decode(errors="replace")) :]


def _is_open(tail: bytes) -> bool:
    try:
        tail.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start == 0
    return False


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_token_by_token_is_never_cut_inside_a_character(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts, _ = stream(tokenizer, [0], [[token_id] for token_id in ids])
    assert "".join(texts) == tokenizer.decode(ids) == tokenizer._tokenizer.decode(ids)
    assert "�" not in "".join(texts)
    assert texts[-1] == ""  # every character was out as soon as its last byte was


@given(prompt=pieces, pushes=st.lists(pieces, max_size=6))
@settings(max_examples=400, deadline=None)
@example(prompt=[], pushes=[[]])
def test_random_ids_of_a_byte_level_vocabulary(byte_level, prompt, pushes):
    texts, _ = stream(byte_level, prompt, pushes)
    output = [token_id for push in pushes for token_id in push]
    assert "".join(texts) == added_text(byte_level, prompt, output)


@given(prompt=pieces, pushes=st.lists(pieces, max_size=6))
@settings(max_examples=400, deadline=None)
def test_random_ids_of_a_sentencepiece_vocabulary(sentencepiece, prompt, pushes):
    texts, _ = stream(sentencepiece, prompt, pushes)
    output = [token_id for push in pushes for token_id in push]
    assert "".join(texts) == added_text(sentencepiece, prompt, output)


@given(before=st.text(max_size=8), after=st.text(max_size=12), data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_text_cut_anywhere(byte_level, before, after, data):
    """Prompt and output are one text, cut between two tokens that may share a character."""
    ids = byte_level.encode((before + after).replace("\0", ""), add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    texts, _ = stream(byte_level, ids[:cut], [[token_id] for token_id in ids[cut:]])
    assert "".join(texts) == added_text(byte_level, ids[:cut], ids[cut:])


def test_half_a_character_waits_and_is_replaced_only_when_certain(byte_level):
    ids = [
        byte_level._backend.token_to_id(stand_in) for stand_in in ("ê", "\u00b8", "a")
    ]  # the first two bytes of 글, then a
    detokenizer = Detokenizer(byte_level, [], ())
    assert detokenizer.push([ids[0]]) == ""
    assert detokenizer.push([ids[1]]) == ""
    assert detokenizer.push([ids[2]]) == "�a"
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.finish() == "�"


def test_bytes_of_a_surrogate_are_replaced_at_once(byte_level):
    lead, surrogate = (byte_level._backend.token_to_id(stand_in) for stand_in in "íł")  # ED A0
    assert byte_level.bytes.of(lead) + byte_level.bytes.of(surrogate) == b"\xed\xa0"
    assert stream(byte_level, [], [[lead], [surrogate]])[0] == ["", "��", ""]
    assert stream(byte_level, [lead, surrogate], [])[0] == [""]


def test_the_space_that_sentencepiece_adds_is_dropped_only_at_the_very_start(sentencepiece):
    cat = sentencepiece._backend.token_to_id("▁cat")
    assert stream(sentencepiece, [], [[cat], [cat]])[0] == ["cat", " cat", ""]
    assert stream(sentencepiece, [0], [[cat]])[0] == ["cat", ""]  # a beginning-of-sequence token is no text
    assert stream(sentencepiece, [0, cat], [[cat]])[0] == [" cat", ""]


def test_special_tokens_have_no_text(byte_level):
    ids = byte_level.encode("the<|user|> cat</s>", add_special_tokens=False)
    assert "".join(stream(byte_level, [], [ids])[0]) == "the cat"


class TestStop:
    def test_spans_tokens(self, byte_level):
        ids = byte_level.encode("the cat 안녕 sat", add_special_tokens=False)
        texts, found = stream(byte_level, [], [[token_id] for token_id in ids], ("t 안녕",))
        assert ("".join(texts), found) == ("the ca", "t 안녕")

    def test_inside_a_token(self, byte_level):
        ids = byte_level.encode(" the", add_special_tokens=False)
        assert len(ids) == 1
        assert stream(byte_level, [], [ids], ("h",)) == ([" t", ""], "h")

    def test_nothing_follows(self, byte_level):
        detokenizer = Detokenizer(byte_level, [], ("cat",))
        ids = byte_level.encode("the cat sat", add_special_tokens=False)
        assert detokenizer.push(ids) == "the "
        assert detokenizer.push(ids) == ""
        assert detokenizer.finish() == ""

    def test_only_a_possible_prefix_is_held_back(self, byte_level):
        detokenizer = Detokenizer(byte_level, [], ("</end>",))
        letters = {letter: byte_level._backend.token_to_id(letter) for letter in "ab</en"}
        assert detokenizer.push([letters["a"]]) == "a"
        assert detokenizer.push([letters["<"]]) == ""
        assert detokenizer.push([letters["/"]]) == ""
        assert detokenizer.push([letters["<"]]) == "</"
        assert detokenizer.push([letters["b"]]) == "<b"
        assert detokenizer.push([letters["<"], letters["/"], letters["e"]]) == ""
        assert detokenizer.finish() == "</e"
        assert detokenizer.stopped_by is None

    def test_the_prompt_is_not_searched(self, byte_level):
        ids = byte_level.encode("the cat", add_special_tokens=False)
        assert "".join(stream(byte_level, ids, [ids], ("tt",))[0]) == "the cat"


def first_match(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Reads character by character, with nothing clever."""
    for end in range(len(text) + 1):
        complete = [pattern for pattern in stop if text[:end].endswith(pattern)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def longest_prefix_at_end(text: str, stop: list[str]) -> str:
    """The longest end of the text that a longer text may still turn into a stop string."""
    prefixes = {pattern[:length] for pattern in stop for length in range(1, len(pattern))}
    return max((prefix for prefix in prefixes if text.endswith(prefix)), key=len, default="")


@given(
    text=st.text("ab한", max_size=24),
    stop=st.lists(st.text("ab한", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 24), max_size=8),
)
@settings(max_examples=600, deadline=None)
@example(text="abababac", stop=["ababac"], cuts=[])
@example(text="xabcd", stop=["abcde", "cd"], cuts=[])
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, stop, cuts):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    search = StopStrings(stop)
    given_out = ""
    for begin, end in pairwise(bounds):
        given_out += search.feed(text[begin:end])
        if search.found is None:
            assert text[:end] == given_out + longest_prefix_at_end(text[:end], stop)
    given_out += search.flush()
    assert (given_out, search.found) == first_match(text, stop)


class CountingBytes:
    """The vocabulary's bytes, counting how many tokens are looked up."""

    def __init__(self, tokenizer: Tokenizer):
        self.bytes = self
        self.starts_stripped = tokenizer.bytes.starts_stripped
        self.is_special = tokenizer.bytes.is_special
        self._of = tokenizer.bytes.of
        self.lookups = 0

    def of(self, token_id: int) -> bytes:
        self.lookups += 1
        return self._of(token_id)


def test_each_token_is_decoded_once_even_in_an_endless_run_of_invalid_bytes(byte_level):
    counting = CountingBytes(byte_level)
    invalid = byte_level._backend.token_to_id("ÿ")
    detokenizer = Detokenizer(counting, [invalid] * 1000, ("never",))
    in_prompt = counting.lookups
    assert in_prompt <= 4  # the end of the prompt is enough
    assert "".join(detokenizer.push([invalid]) for _ in range(1000)) == "�" * 1000
    assert counting.lookups - in_prompt == 1000
