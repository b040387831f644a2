"""Tiny models, made by transformers with random weights, that every test may share."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure() -> None:
    # A script's background job ignores SIGINT, and so would the processes that tests start in order to interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests start Ray while gRPC of the test before is at work still; see `Session.start`.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges: 256 bytes, some words, three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A Hugging Face directory with a random llama and a byte-level tokenizer; keywords change its config."""

    def make(**overrides: object) -> Path:
        directory = tmp_path_factory.mktemp("tiny")
        tokenizer = byte_tokenizer()
        config = LlamaConfig(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "max_position_embeddings": 512,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "tie_word_embeddings": False,
                "dtype": "float32",
                **overrides,
            }
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)  # sharper distributions than the initialisation's, so that argmax is stable
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model()
