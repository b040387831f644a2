"""GGUF tensors -> Hugging Face safetensors.

llama.cpp's converter renames every tensor, interleaves the rotary halves of llama's query and key rows and
transposes GPT-2's Conv1D matrices (`convert_hf_to_gguf.py`); this module undoes the three. Quantised blocks are
dequantised by the `gguf` package. Memory: one shard at a time.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file

MAX_SHARD_BYTES = 2 << 30

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GPT2_TOP_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2_LAYER_NAMES = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<leaf>\w+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """Where a tensor goes: its Hugging Face name, and what undoes llama.cpp's layout."""

    name: str
    undo: Callable[[NDArray[Any]], NDArray[Any]]
    source: ReaderTensor

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        values = self.undo(dequantize(self.source.data, self.source.tensor_type))
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)  # a copy: the file is mapped read-only


def storage_dtype(tensors: Sequence[ReaderTensor]) -> torch.dtype:
    """float32 or float16 if every matrix is; bfloat16 for quantised and bfloat16 files."""
    kinds = {tensor.tensor_type for tensor in tensors if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return torch.float32
    if kinds == {GGMLQuantizationType.F16}:
        return torch.float16
    return torch.bfloat16


def write_safetensors(
    directory: Path,
    tensors: Sequence[ReaderTensor],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    progress: Callable[[float], None],
) -> None:
    """Writes `model.safetensors`, or shards of at most 2 GiB with their index. ValueError names the tensor at fault."""
    targets = [_target(tensor, config) for tensor in tensors]
    _check_complete({target.name for target in targets}, config)
    shards = list(_shards(targets, dtype.itemsize))
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    total = sum(tensor.n_elements for tensor in tensors)
    done = 0
    for name, shard in zip(names, shards, strict=True):
        loaded = {}
        for target in shard:
            loaded[target.name] = target.load(dtype).contiguous()
            done += target.source.n_elements
            progress(done / total)
        save_file(loaded, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {target.name: name for name, shard in zip(names, shards, strict=True) for target in shard}
        index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(targets: Sequence[_Target], itemsize: int) -> Iterator[list[_Target]]:
    shard: list[_Target] = []
    size = 0
    for target in targets:
        num_bytes = target.source.n_elements * itemsize
        if shard and size + num_bytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(target)
        size += num_bytes
    yield shard


def _target(tensor: ReaderTensor, config: Mapping[str, Any]) -> _Target:
    match = _NAME.fullmatch(tensor.name)
    top, layers, stem = _name_maps(config)
    new = None if match is None else (top if match["layer"] is None else layers).get(match["leaf"])
    if match is None or new is None:
        raise ValueError(f"tensor {tensor.name} is not part of a {config['model_type']} model")
    name = new if match["layer"] is None else f"{stem}.{match['layer']}.{new}"
    return _Target(name=f"{name}.{match['kind']}", undo=_undo(match["leaf"], match["kind"], config), source=tensor)


def _undo(leaf: str, kind: str, config: Mapping[str, Any]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    if config["model_type"] == "gpt2":
        return np.transpose if kind == "weight" and leaf in _GPT2_TRANSPOSED else _same
    if config["model_type"] in ("llama", "mistral") and leaf in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"]
        return lambda weight: _halves(weight, heads)
    return _same


def _same(weight: NDArray[Any]) -> NDArray[Any]:
    return weight


def _halves(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows of each head from interleaved pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...)."""
    return weight.reshape(num_heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _name_maps(config: Mapping[str, Any]) -> tuple[Mapping[str, str], Mapping[str, str], str]:
    if config["model_type"] == "gpt2":
        return _GPT2_TOP_NAMES, _GPT2_LAYER_NAMES, "transformer.h"
    layers = _LAYER_NAMES | (_QK_NORM_NAMES if config["model_type"] == "qwen3" else {})
    return _TOP_NAMES, layers, "model.layers"


def _check_complete(names: set[str], config: Mapping[str, Any]) -> None:
    """Weights only; biases and shapes are the checkpoint reader's to compare with the configuration."""
    top, layers, stem = _name_maps(config)
    num_layers = config["n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"]
    needed = {f"{new}.weight" for leaf, new in top.items() if leaf != "output" or not config["tie_word_embeddings"]}
    needed |= {f"{stem}.{layer}.{new}.weight" for layer in range(num_layers) for new in layers.values()}
    if missing := sorted(needed - names):
        raise ValueError(f"{len(missing)} tensors are missing, {missing[0]} among them")
