"""Compared with transformers' tokenizer of the same directory."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayllm.core.errors import CheckpointError, InvalidRequestError
from rayllm.core.tokenizer import Tokenizer

TEXTS = [
    "the cat",
    "  two  spaces ",
    "안녕하세요 세상",
    "👩‍👩‍👧 and 👍🏽",
    "",
    "<|user|>hi</s>",
    "a\nb\tc",
    "naïve ﬁ é",
    "<한 글>x",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_and_decodes_as_transformers_does(tokenizer: Tokenizer, text, add_special_tokens):
    reference = tokenizer._tokenizer
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    assert ids == reference.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 420), max_size=30), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_ids_of_a_byte_level_vocabulary_decode_as_transformers_does(byte_level_directory, ids, skip):
    tokenizer = _load_once(byte_level_directory)
    known = [token_id for token_id in ids if token_id < tokenizer.vocab_size]
    expected = tokenizer._tokenizer.decode(known, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_a_byte_run_that_is_not_utf8_keeps_its_valid_characters(sentencepiece_directory):
    """transformers would turn every byte of the run into U+FFFD, valid ones too; a stream could not wait for that."""
    tokenizer = Tokenizer.load(sentencepiece_directory)
    ids = [*tokenizer._backend.encode("글", add_special_tokens=False).ids, tokenizer._backend.token_to_id("<0xFF>")]
    assert tokenizer.decode(ids) == "글�"


def test_token_bytes(tokenizer: Tokenizer):
    text = "the cat 글 👍🏽"
    joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False)))
    assert joined.removeprefix(b" ") == text.encode()
    assert tokenizer.token_bytes(0) == b"<s>"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
    assert b"\x00" in {tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)}


def test_no_text_has_more_characters_than_its_tokens_allow(tokenizer: Tokenizer):
    for text in [*TEXTS, "the cat " * 50]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(text) <= tokenizer.max_chars_per_token * max(len(ids), 0)


def test_end_of_sequence_ids_come_from_all_three_places(byte_level_directory: Path, tmp_path: Path):
    assert Tokenizer.load(byte_level_directory).eos_token_ids == {1, 3}
    for file in byte_level_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 2}))
    assert Tokenizer.load(tmp_path).eos_token_ids == {1, 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": "</s>"}))
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id: '</s>' is not a token id"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"), [("a\0b", "NUL character at position 1"), ("ab\ud83d", "surrogate at position 2")]
)
def test_text_that_cannot_be_encoded_is_refused(tokenizer: Tokenizer, text, problem):
    with pytest.raises(InvalidRequestError, match=f"^prompt: .*{problem}"):
        tokenizer.encode(text)


class TestChat:
    MESSAGES = ({"role": "user", "content": "the 안녕"}, {"role": "assistant", "content": "cat"})

    @pytest.mark.parametrize("add_generation_prompt", [True, False])
    def test_is_the_tokenizers_own_template(self, byte_level_directory, add_generation_prompt):
        reference = AutoTokenizer.from_pretrained(byte_level_directory).apply_chat_template(
            list(self.MESSAGES), add_generation_prompt=add_generation_prompt
        )
        tokenizer = Tokenizer.load(byte_level_directory)
        assert tokenizer.has_chat_template
        assert tokenizer.chat(self.MESSAGES, add_generation_prompt=add_generation_prompt) == reference["input_ids"]

    @pytest.mark.parametrize(
        ("messages", "problem"),
        [
            ([], "is empty"),
            ([{"role": "tool", "content": "x"}], "no tools here"),
            ([{"role": "user", "content": "\0"}], "NUL"),
        ],
    )
    def test_messages_that_the_template_refuses(self, byte_level_directory, messages, problem):
        with pytest.raises(InvalidRequestError, match=f"^messages: .*{problem}"):
            Tokenizer.load(byte_level_directory).chat(messages)

    def test_without_a_template(self, sentencepiece_directory):
        tokenizer = Tokenizer.load(sentencepiece_directory)
        assert not tokenizer.has_chat_template
        with pytest.raises(InvalidRequestError, match="no chat template"):
            tokenizer.chat(self.MESSAGES)


class TestLoad:
    def test_directory_that_is_not_there(self, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere: is not a directory"):
            Tokenizer.load(tmp_path / "nowhere")

    def test_directory_without_a_tokenizer(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
            Tokenizer.load(tmp_path)

    def test_damaged_tokenizer_file(self, byte_level_directory, tmp_path):
        for file in byte_level_directory.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.name == "tokenizer.json" else None])
        with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
            Tokenizer.load(tmp_path)

    def test_decoder_of_another_kind(self, tmp_path):
        backend = Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece()
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: a decoder of type WordPiece is not supported"):
            Tokenizer.load(tmp_path)


def test_threads_may_share_one(byte_level_directory):
    tokenizer = Tokenizer.load(byte_level_directory)
    texts = [f"the cat {number} 안녕" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(tokenizer.encode, texts))
    assert list(map(tokenizer.decode, encoded)) == texts


def test_importing_it_is_cheap():
    code = "import sys, rayllm.core.tokenizer; print(*({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


_LOADED: dict[Path, Tokenizer] = {}


def _load_once(directory: Path) -> Tokenizer:
    if directory not in _LOADED:
        _LOADED[directory] = Tokenizer.load(directory)
    return _LOADED[directory]
