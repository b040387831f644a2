"""What is learnt of a row: the assistant's tokens with the end of turn, by both ways that templates allow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from rayllm.core.errors import DataError
from rayllm.core.tokenizer import Tokenizer
from rayllm.train.data.documents import chat_document, preference_pair, text_document
from rayllm.train.data.rows import ChatRow, PreferenceRow, TextRow

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
FORGETFUL = (  # as templates that leave the thoughts of earlier turns out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)
SILENT = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
    """A byte-level vocabulary in which line feeds join, as in Llama 3's and Qwen's."""

    def make(template: str | None) -> Tokenizer:
        vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        merges = [("Ċ", "Ċ"), ("t", "h"), ("th", "e")]
        for left, right in merges:
            vocab[left + right] = len(vocab)
        backend = Backend(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+|\S+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
        fast.chat_template = template
        directory = tmp_path_factory.mktemp("tokenizer")
        fast.save_pretrained(directory)
        return Tokenizer.load(directory)

    made: dict[str | None, Tokenizer] = {}
    return lambda template: made.setdefault(template, made.get(template) or make(template))


def chat(*contents: str) -> ChatRow:
    roles = ("user", "assistant")
    return ChatRow(messages=tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)))


def learnt(tokenizer: Tokenizer, document) -> list[str]:
    """The texts of the runs of learnt tokens."""
    texts, run = [], []
    for token, wanted in zip(document.tokens.tolist(), document.mask.tolist(), strict=True):
        if wanted:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return texts + ([tokenizer.decode(run, skip_special_tokens=False)] if run else [])


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_WITHOUT_END])
def test_the_assistants_turns_and_their_ends_are_learnt(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    row = chat("the user", "the answer", "more", "글 again", "left open")
    document = chat_document(tokenizer, row)
    assert learnt(tokenizer, document) == ["the answer<|im_end|>", "글 again<|im_end|>"]
    assert document.tokens.tolist() == tokenizer.chat(row.messages, add_generation_prompt=False)


@pytest.mark.parametrize("template", [CHATML, MARKED])
@given(contents=st.lists(st.text(st.sampled_from("\n the글<|>"), max_size=8), min_size=2, max_size=6))
@settings(max_examples=150, deadline=None)
def test_what_comes_before_an_answer_is_what_serving_feeds(make_tokenizer, template, contents):
    """Also where answer and template would share a token. The answers' texts come out whole."""
    tokenizer = make_tokenizer(template)
    row = chat(*contents)
    document = chat_document(tokenizer, row)
    starts = np.flatnonzero(np.diff(np.concatenate([[False], document.mask]).astype(int)) == 1)
    answers = contents[1::2]
    assert learnt(tokenizer, document) == [answer + "<|im_end|>" for answer in answers]
    assert document.tokens[: starts[0]].tolist() == tokenizer.chat(row.messages[:1])
    text = tokenizer.decode(document.tokens.tolist(), skip_special_tokens=False)
    assert text == tokenizer.render_chat(row.messages, add_generation_prompt=False)


def test_a_template_that_marks_agrees_with_transformers_mask(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(MARKED)
    row = chat("the", "one\n\ntwo", "\n\n", "글")
    reference = tokenizer._tokenizer.apply_chat_template(
        [dict(m) for m in row.messages], return_dict=True, return_assistant_tokens_mask=True
    )
    document = chat_document(tokenizer, row)
    assert document.tokens.tolist() == reference["input_ids"]
    assert document.mask.astype(int).tolist() == reference["assistant_masks"]


@pytest.mark.parametrize(
    ("template", "contents", "problem"),
    [
        (FORGETFUL, ("a", "b", "c", "d"), r"messages\[1\]: the chat template renders a turn otherwise when others"),
        (SILENT, ("a", "b"), "gives the assistant no tokens"),
    ],
)
def test_what_cannot_be_told_apart_is_an_error(make_tokenizer, template, contents, problem):
    with pytest.raises(DataError, match=problem):
        chat_document(make_tokenizer(template), chat(*contents))


def test_a_conversation_of_one_answer_needs_no_stable_template(make_tokenizer):
    tokenizer = make_tokenizer(FORGETFUL)
    assert learnt(tokenizer, chat_document(tokenizer, chat("a", "b"))) == ["b<|im_end|>"]


def test_the_assistant_first(make_tokenizer):
    row = ChatRow(messages=({"role": "assistant", "content": "a"},))
    with pytest.raises(DataError, match="cannot begin with the assistant"):
        chat_document(make_tokenizer(CHATML), row)
    tokenizer = make_tokenizer(MARKED)
    assert learnt(tokenizer, chat_document(tokenizer, row)) == ["a<|im_end|>"]


def test_a_text_ends_with_the_end_of_sequence_once(tokenizer: Tokenizer):
    plain = tokenizer.encode("the cat")
    document = text_document(tokenizer, TextRow(text="the cat"))
    assert document.tokens.tolist() == [*plain, tokenizer.eos_token_id]
    assert document.mask.tolist() == [False] + [True] * len(plain)
    again = text_document(tokenizer, TextRow(text="the cat</s>"))
    assert again.tokens.tolist().count(tokenizer.eos_token_id) == 1


class TestPairs:
    def test_texts(self, tokenizer: Tokenizer):
        row = PreferenceRow(prompt="the", chosen=" cat", rejected=" dog sat")
        pair = preference_pair(tokenizer, row)
        assert pair.prompt == tokenizer.encode("the")
        assert pair.prompt + pair.chosen == [*tokenizer.encode("the cat"), tokenizer.eos_token_id]
        assert pair.rejected[-1] == tokenizer.eos_token_id

    @pytest.mark.parametrize("template", [CHATML, MARKED, FORGETFUL])
    def test_conversations(self, make_tokenizer, template):
        tokenizer = make_tokenizer(template)
        prompt = ({"role": "user", "content": "the"},)
        row = PreferenceRow(
            prompt=prompt,
            chosen=({"role": "assistant", "content": "\n\nyes"},),
            rejected=({"role": "assistant", "content": "no"},),
        )
        pair = preference_pair(tokenizer, row)
        assert pair.prompt == tokenizer.chat(prompt)
        assert tokenizer.decode(pair.chosen, skip_special_tokens=False) == "\n\nyes<|im_end|>"
        assert tokenizer.decode(pair.rejected, skip_special_tokens=False) == "no<|im_end|>"

    def test_answers_of_the_same_tokens(self, make_tokenizer):
        answers = [({"role": "assistant", "content": text},) for text in ("a", "a ")]
        tokenizer = make_tokenizer(CHATML.replace("m.content", "m.content | trim"))
        row = PreferenceRow(prompt=({"role": "user", "content": "q"},), chosen=answers[0], rejected=answers[1])
        with pytest.raises(DataError, match="give the same tokens"):
            preference_pair(tokenizer, row)


def test_fingerprints_change_with_what_they_name(make_tokenizer):
    plain, marked, none = map(make_tokenizer, (CHATML, MARKED, None))
    assert plain.fingerprint == marked.fingerprint
    assert plain.template_fingerprint != marked.template_fingerprint
    assert none.template_fingerprint is None
