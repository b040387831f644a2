"""GGUF metadata -> the arguments of a transformers configuration, for the families that the decoder knows.

Honour or refuse: a key of the architecture's own namespace that is not understood here is an error, because it
would change what the model computes. Key names: the GGUF specification and `gguf.constants.Keys`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The names of llama.cpp's architectures; mistral checkpoints are written as "llama".
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")

_COMMON_KEYS = {
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "vocab_size",
    "tensor_data_layout",
}
_KEYS = {
    "gpt2": _COMMON_KEYS | {"attention.layer_norm_epsilon"},
    "llama": _COMMON_KEYS
    | {
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    },
}
_KEYS["qwen2"] = _KEYS["qwen3"] = _KEYS["llama"] - {"attention.sliding_window"}


def transformers_config(
    metadata: Mapping[str, Any], *, vocab_size: int, tied: bool, biases: frozenset[str], rope_freqs: NDArray[Any] | None
) -> dict[str, Any]:
    """`model_type`, `architectures` and the rest.

    `biases`: the leaf names of layer 0 that have a bias ("attn_q", "ffn_up", ...). `rope_freqs`: llama.cpp's
    per-frequency divisors, which is how it stores the `llama3` rope scaling. Raises ValueError with the key at fault.
    """
    arch = metadata["general.architecture"]
    if arch not in ARCHITECTURES:
        raise ValueError(f"general.architecture: {arch!r} is not one of {', '.join(ARCHITECTURES)}")
    prefix = f"{arch}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key in values:
        if key not in _KEYS[arch]:
            raise ValueError(f"{prefix}{key} is not supported")
    tokens = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    shared = {"vocab_size": vocab_size, "tie_word_embeddings": tied, **tokens}
    try:
        return (_gpt2(values) if arch == "gpt2" else _rotary(arch, values, biases, rope_freqs)) | shared
    except KeyError as error:
        raise ValueError(f"{prefix}{error.args[0]} is missing") from None


def _gpt2(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": values["context_length"],
        "n_embd": values["embedding_length"],
        "n_layer": values["block_count"],
        "n_head": values["attention.head_count"],
        "n_inner": values["feed_forward_length"],
        "layer_norm_epsilon": values["attention.layer_norm_epsilon"],
        "activation_function": "gelu_new",
    }


def _rotary(
    arch: str, values: Mapping[str, Any], biases: frozenset[str], rope_freqs: NDArray[Any] | None
) -> dict[str, Any]:
    num_heads = values["attention.head_count"]
    rope_dim = values.get("rope.dimension_count")
    head_dim = values.get("attention.key_length") or rope_dim or values["embedding_length"] // num_heads
    if values.get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{arch}.attention.value_length differs from the key's, which is not supported")
    if rope_dim is not None and rope_dim != head_dim:
        raise ValueError(f"{arch}.rope.dimension_count: {rope_dim} of {head_dim} dimensions is not supported")
    config = {
        "model_type": arch,
        "max_position_embeddings": values["context_length"],
        "hidden_size": values["embedding_length"],
        "num_hidden_layers": values["block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": values.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": values["feed_forward_length"],
        "rms_norm_eps": values["attention.layer_norm_rms_epsilon"],
        "rope_parameters": _rope(arch, values, head_dim, rope_freqs),
    }
    window = values.get("attention.sliding_window")
    if arch == "llama" and window is not None:
        config |= {"model_type": "mistral", "sliding_window": window}
    elif arch == "llama":
        config |= {"attention_bias": "attn_q" in biases, "mlp_bias": "ffn_up" in biases}
    elif arch == "qwen3":
        config["attention_bias"] = "attn_q" in biases
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config["architectures"] = [f"{names[config['model_type']]}ForCausalLM"]
    return config


def _rope(arch: str, values: Mapping[str, Any], head_dim: int, rope_freqs: NDArray[Any] | None) -> dict[str, Any]:
    theta = values.get("rope.freq_base", 10000.0)
    kind = values.get("rope.scaling.type", "none")
    if rope_freqs is not None:
        if kind != "none":
            raise ValueError(f"{arch}.rope.scaling.type: {kind!r} together with rope_freqs.weight is not supported")
        return {"rope_theta": theta, **_llama3_scaling(rope_freqs, theta, head_dim)}
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{arch}.rope.scaling.type: {kind!r} is not supported")
    scaling = {"rope_theta": theta, "rope_type": kind, "factor": values["rope.scaling.factor"]}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = values["rope.scaling.original_context_length"]
    return scaling


def _llama3_scaling(rope_freqs: NDArray[Any], theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that gives these divisors: Llama 3.1's, whose only free value in published models is the factor."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(rope_freqs.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((8192 / wavelengths - 1.0) / 3.0, 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / float(rope_freqs.max()) + smooth)
    if rope_freqs.shape != expected.shape or not np.allclose(rope_freqs, expected, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not the frequency scaling of Llama 3.1")
    return scaling
