"""A checkpoint that cannot be served is refused in one line that names the file and what is wrong."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from rayllm.core.errors import CheckpointError, ConfigError
from rayllm.models.checkpoint import SCORE, Checkpoint
from tests.tiny_models import save_tiny

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def edit(directory: Path, changes: dict[str, Tensor | None]) -> None:
    """Stores other tensors under the names given; None: removes it."""
    tensors = {**load_file(directory / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / WEIGHTS)


def set_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def shard(directory: Path) -> dict[str, str]:
    """Splits the weights over two files; returns the index's weight_map."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file_name in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file_name}, directory / file_name)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny(tmp_path, "llama-gqa")
    return tmp_path


def refused(directory: Path, file: str, problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    path = directory / file if file else directory
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def whole(checkpoint: Checkpoint, parameter: str) -> Tensor:
    return checkpoint.read(parameter, tuple(slice(0, size) for size in checkpoint.shape(parameter)))


def test_sharded_checkpoint_reads_as_the_single_file_does(llama: Path) -> None:
    single = {name: tensor.clone() for name, tensor in load_file(llama / WEIGHTS).items()}
    shard(llama)
    checkpoint = Checkpoint.open(llama)
    assert checkpoint.dtype == torch.float32
    assert checkpoint.config["vocab_size"] == 101
    torch.testing.assert_close(whole(checkpoint, UP_PROJ.removeprefix("model.")), single[UP_PROJ], rtol=0, atol=0)
    part = checkpoint.read("layers.1.mlp.up_proj.weight", (slice(3, 9), slice(40, 48)))
    torch.testing.assert_close(part, single[UP_PROJ][3:9, 40:48], rtol=0, atol=0)


def test_missing_things(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    refused(llama / "nowhere", "", "no such directory")
    refused(llama / WEIGHTS, "", "is a file, not a directory")
    empty = tmp_path_factory.mktemp("empty")
    refused(empty, "config.json", "no such file")
    (empty / "config.json").write_text((llama / "config.json").read_text())
    refused(empty, "", f"holds neither {WEIGHTS} nor {INDEX}")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1,}', b"\xff\xfe{}"])
def test_malformed_config(llama: Path, content: str | bytes) -> None:
    (llama / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(llama, "config.json", "must hold a JSON object" if content == "[1]" else "is not valid JSON")


def test_unsupported_config_is_refused_before_weights_are_looked_at(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    set_config(llama, hidden_act="swiglu")
    with pytest.raises(ConfigError, match="hidden_act"):
        Checkpoint.open(llama)


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    """It has all the tensors of one where the head is tied."""
    save_tiny(tmp_path, "llama-mqa-tied")
    Checkpoint.open(tmp_path)
    set_config(tmp_path, architectures=["LlamaForSequenceClassification"])
    refused(tmp_path, "", "LlamaForSequenceClassification")


@pytest.mark.parametrize("case", ["llama-mqa-tied", "llama-gqa"])
def test_a_reward_model_is_read_as_one(tmp_path: Path, case: str) -> None:
    """As transformers writes it: the bare model's tensors, and one row."""
    save_tiny(tmp_path / "language", case)
    with pytest.raises(CheckpointError, match="is no reward model, but LlamaForCausalLM"):
        Checkpoint.open(tmp_path / "language", scores=True)
    config = AutoConfig.from_pretrained(tmp_path / "language", num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "reward")
    checkpoint = Checkpoint.open(tmp_path / "reward", scores=True)
    assert "lm_head.weight" not in checkpoint.parameters
    torch.testing.assert_close(whole(checkpoint, SCORE), model.score.weight.detach(), rtol=0, atol=0)
    embedding = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(whole(checkpoint, "embed_tokens.weight"), embedding, rtol=0, atol=0)
    edit(tmp_path / "reward", {SCORE: torch.zeros(2, 48)})
    with pytest.raises(
        CheckpointError, match=r"tensor score.weight has shape \[2, 48\], config.json asks for \[1, 48\]"
    ):
        Checkpoint.open(tmp_path / "reward", scores=True)


@pytest.mark.parametrize("case", ["llama-mqa-tied", "gpt2-untied"])
def test_weights_in_memory_are_read_as_those_of_a_file(tmp_path: Path, case: str) -> None:
    save_tiny(tmp_path, case)
    stored = Checkpoint.open(tmp_path)
    tied = stored.spec.tie_word_embeddings
    names = [name for name in stored.parameters if not (tied and name == "lm_head.weight")]
    held = Checkpoint.held(tmp_path, stored.config, {name: whole(stored, name) for name in names})
    assert held.spec == stored.spec
    assert held.dtype == stored.dtype
    for name in stored.parameters:
        torch.testing.assert_close(whole(held, name), whole(stored, name), rtol=0, atol=0)


@pytest.mark.parametrize("kept", [0, 5, 60, 3000, -1])
def test_truncated_file(llama: Path, kept: int) -> None:
    content = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(content[:kept])
    refused(llama, WEIGHTS, "is truncated or damaged")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_loaded(llama: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("the pickle was loaded",))

    (llama / WEIGHTS).unlink()
    (llama / name).write_bytes(pickle.dumps(Bomb()))
    refused(llama, name, "pickled weights are not loaded")
    (llama / name).rename(llama / WEIGHTS)
    refused(llama, WEIGHTS, "is a pickle, not a safetensors file")


def test_torch_save_and_lfs_pointer_under_the_name_of_safetensors(llama: Path) -> None:
    torch.save({"a": torch.zeros(3)}, llama / WEIGHTS)
    refused(llama, WEIGHTS, "is a pickle, not a safetensors file")
    (llama / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(llama, WEIGHTS, "is a Git LFS pointer")


def test_tensor_missing_or_of_another_shape(llama: Path) -> None:
    edit(llama, {UP_PROJ: torch.zeros(72, 47)})
    refused(llama, WEIGHTS, f"tensor {UP_PROJ} has shape [72, 47], config.json asks for [72, 48]")
    edit(llama, {UP_PROJ: None})
    refused(llama, WEIGHTS, f"tensor {UP_PROJ} is missing")


def test_tensor_that_the_config_knows_nothing_of(llama: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(llama, {name: torch.zeros(48)})
    refused(llama, WEIGHTS, f"tensor {name} is not part of a llama model")
    edit(llama, {name: None})
    # Old exports hold the rotary frequencies, which are computed anyway.
    edit(llama, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    Checkpoint.open(llama)


def test_integer_weights(llama: Path) -> None:
    edit(llama, {UP_PROJ: torch.zeros(72, 48, dtype=torch.int8)})
    refused(llama, WEIGHTS, f"tensor {UP_PROJ} has unsupported dtype I8")


def test_damaged_index(llama: Path) -> None:
    weight_map = shard(llama)
    (llama / INDEX).write_text("{}")
    refused(llama, INDEX, "has no weight_map")
    write_index(llama, {**weight_map, UP_PROJ: "model-00003-of-00002.safetensors"})
    refused(llama, INDEX, "names model-00003-of-00002.safetensors, which does not exist")
    write_index(llama, {**weight_map, UP_PROJ: "../model.safetensors"})
    refused(llama, INDEX, "which is not a file name")
    other = next(file_name for file_name in weight_map.values() if file_name != weight_map[UP_PROJ])
    write_index(llama, {**weight_map, UP_PROJ: other})
    refused(llama, other, f"tensor {UP_PROJ} is missing, though {INDEX} names it")


def test_tied_embeddings_stored_once_twice_or_only_as_the_head(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-mqa-tied")
    embedding = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"].clone()
    for parameter in ("embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(whole(Checkpoint.open(tmp_path), parameter), embedding, rtol=0, atol=0)
    edit(tmp_path, {"lm_head.weight": embedding.clone()})
    Checkpoint.open(tmp_path)
    edit(tmp_path, {"model.embed_tokens.weight": None})
    for parameter in ("embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(whole(Checkpoint.open(tmp_path), parameter), embedding, rtol=0, atol=0)
    edit(tmp_path, {"model.embed_tokens.weight": embedding + 1})
    refused(tmp_path, WEIGHTS, "tensor lm_head.weight differs from model.embed_tokens.weight")


def test_untied_head_must_be_stored(llama: Path) -> None:
    edit(llama, {"lm_head.weight": None})
    refused(llama, WEIGHTS, "tensor lm_head.weight is missing")


def test_gpt2_as_first_published(tmp_path: Path) -> None:
    """No prefix, no head, and a causal mask among the weights; transposed and fused matrices."""
    reference = save_tiny(tmp_path, "gpt2-tied")
    stored = {
        name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(tmp_path / WEIGHTS).items()
    }
    save_file({**stored, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}, tmp_path / WEIGHTS)
    checkpoint = Checkpoint.open(tmp_path)
    fused = reference.transformer.h[2].attn.c_attn
    part = checkpoint.read("layers.2.self_attn.k_proj.weight", (slice(8, 24), slice(0, 48)))
    torch.testing.assert_close(part, fused.weight[:, 48 + 8 : 48 + 24].t(), rtol=0, atol=0)
    bias = checkpoint.read("layers.2.self_attn.v_proj.bias", (slice(8, 24),))
    torch.testing.assert_close(bias, fused.bias[96 + 8 : 96 + 24], rtol=0, atol=0)


def test_dtype_is_the_one_named_else_the_one_stored(llama: Path) -> None:
    set_config(llama, dtype="bfloat16")
    assert Checkpoint.open(llama).dtype == torch.bfloat16
    set_config(llama, dtype=None, torch_dtype="float16")
    assert Checkpoint.open(llama).dtype == torch.float16
    set_config(llama, dtype=None, torch_dtype=None)
    edit(llama, {name: one.bfloat16() for name, one in load_file(llama / WEIGHTS).items()})
    assert Checkpoint.open(llama).dtype == torch.bfloat16
    set_config(llama, dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match="dtype: 'float8_e4m3fn' is not supported"):
        Checkpoint.open(llama)
