"""GGUF files of every family, converted and compared with the models that they were written from."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer as Backend
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rayllm.core.errors import CheckpointError
from rayllm.core.tokenizer import Tokenizer
from rayllm.models.gguf_convert import convert
from tests.unit.gguf_files import (
    CONFIGS,
    SIZES,
    add_byte_level,
    add_model,
    finish,
    new_writer,
    random_model,
    write_gguf,
)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 3 + 40)[None]
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_originals(name, tmp_path, directory):
    model = random_model(CONFIGS[name])
    convert(write_gguf(tmp_path / "model.gguf", model), directory)
    converted = AutoModelForCausalLM.from_pretrained(directory)
    assert converted.dtype == torch.float32
    assert converted.config.model_type == model.config.model_type
    torch.testing.assert_close(logits(converted), logits(model), rtol=0, atol=2e-5)
    Tokenizer.load(directory)


def test_llama_weights_equal_transformers_own_reading(tmp_path, directory):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = random_model(CONFIGS["llama"])
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    convert(path, directory)
    ours = AutoModelForCausalLM.from_pretrained(directory)
    assert ours.dtype == torch.bfloat16
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)["tensors"]
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_half_precision_files_keep_their_dtype(kind, dtype, tmp_path, directory):
    model = random_model(CONFIGS["qwen3"])
    convert(write_gguf(tmp_path / "model.gguf", model, kind), directory)
    converted = AutoModelForCausalLM.from_pretrained(directory)
    assert converted.dtype == dtype
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(converted.named_parameters())[name], parameter.to(dtype)), name


def test_large_models_are_written_in_shards(tmp_path, directory, monkeypatch):
    monkeypatch.setattr("rayllm.models.gguf_weights.MAX_SHARD_BYTES", 100_000)
    model = random_model(CONFIGS["qwen2"])
    convert(write_gguf(tmp_path / "model.gguf", model), directory)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), logits(model))


class TestTokenizer:
    def test_byte_level(self, tmp_path, directory):
        convert(write_gguf(tmp_path / "model.gguf", random_model(CONFIGS["llama"])), directory)
        tokenizer = Tokenizer.load(directory)
        text = "the 12 안녕 👍🏽<|user|>"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert ids[0] != 0  # no beginning-of-sequence token where the file does not ask for one
        assert ids[-1] == 2
        assert tokenizer.eos_token_ids == {1, 2}
        assert tokenizer.chat([{"role": "user", "content": "the"}]) == tokenizer.encode("the")
        assert AutoConfig.from_pretrained(directory).bos_token_id == 0

    @pytest.mark.parametrize(
        ("pre", "expected"), [("gpt-2", ["12"]), ("smollm", ["1", "2"]), ("llama-bpe", ["<s>", "12"])]
    )
    def test_splits_numbers_as_the_file_says(self, pre, expected, tmp_path, directory):
        model = random_model(CONFIGS["llama"])
        writer = new_writer(tmp_path / "model.gguf", model.config)
        add_byte_level(writer, pre)
        add_model(writer, model)
        finish(writer)
        convert(tmp_path / "model.gguf", directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12")) == expected

    def test_sentencepiece(self, sentencepiece_directory, tmp_path, directory):
        """Against the tokenizer.json whose vocabulary the file holds."""
        backend = Backend.from_file(str(sentencepiece_directory / "tokenizer.json"))
        tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
        model = random_model(LlamaConfig(**{**SIZES, "vocab_size": len(tokens)}))
        writer = new_writer(tmp_path / "model.gguf", model.config)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_token_types([3] * 4 + [2] + [6] * 256 + [1] * (len(tokens) - 261))
        for name, token_id in (("bos", 0), ("eos", 1), ("unk", 4)):
            getattr(writer, f"add_{name}_token_id")(token_id)
        add_model(writer, model)
        finish(writer)
        convert(tmp_path / "model.gguf", directory)
        ours, original = Tokenizer.load(directory), Tokenizer.load(sentencepiece_directory)
        for text in ("the cat", "안녕 the 글 👍🏽"):
            assert ours.decode(ours.encode(text)) == text == original.decode(original.encode(text))
        assert ours.encode("the cat") == original.encode("the cat")


class TestRefused:
    """Each with one line that names the file and what is wrong."""

    def convert(self, directory: Path, edit: Any, config: Any = CONFIGS["llama"]) -> str:
        path = directory.parent / "model.gguf"
        model = random_model(config)
        writer = new_writer(path, config)
        add_byte_level(writer)
        add_model(writer, model)
        edit(writer)
        finish(writer)
        with pytest.raises(CheckpointError) as caught:
            convert(path, directory)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_keys_that_change_the_model(self, directory):
        message = self.convert(directory, lambda writer: writer.add_logit_scale(2.0))
        assert message.endswith("llama.logit_scale is not supported")

    def test_tensors_of_another_model(self, directory):
        extra = np.zeros((64, 64), np.float32)
        message = self.convert(directory, lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", extra))
        assert message.endswith("tensor blk.0.ffn_gate_exps.weight is not part of a llama model")

    def test_missing_tensors(self, directory):
        message = self.convert(directory, lambda writer: writer.tensors[0].pop("blk.1.ffn_up.weight"))
        assert message.endswith("1 tensors are missing, model.layers.1.mlp.up_proj.weight among them")

    def test_unknown_pre_tokenizer(self, directory):
        def edit(writer):
            writer.kv_data[0]["tokenizer.ggml.pre"].value = "klingon"

        assert self.convert(directory, edit).endswith("tokenizer.ggml.pre: 'klingon' is not supported")

    def test_rope_frequencies_that_are_not_llama3s(self, directory):
        divisors = np.linspace(1, 8, 8, dtype=np.float32)
        message = self.convert(directory, lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
        assert message.endswith("rope_freqs.weight is not the frequency scaling of Llama 3.1")

    def test_part_of_a_split_model(self, directory):
        assert "split" in self.convert(directory, lambda writer: writer.add_uint16("split.count", 2))

    def test_another_architecture(self, tmp_path, directory):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
        writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
        finish(writer)
        with pytest.raises(CheckpointError, match="'mamba' is not one of llama, qwen2, qwen3, gpt2"):
            convert(tmp_path / "model.gguf", directory)

    @pytest.mark.parametrize("keep", [0, 3, 100, 3000, 100_000])
    def test_truncated_files(self, keep, tmp_path, directory):
        path = write_gguf(tmp_path / "model.gguf", random_model(CONFIGS["llama"]))
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"model\.gguf: is not a complete GGUF file"):
            convert(path, directory)

    def test_a_file_of_another_kind(self, tmp_path, directory):
        (tmp_path / "model.gguf").write_bytes(b"not a model" * 100)
        with pytest.raises(CheckpointError, match=r"model\.gguf: is not a complete GGUF file"):
            convert(tmp_path / "model.gguf", directory)
