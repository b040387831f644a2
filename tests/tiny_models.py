"""Random checkpoints of every family, written by transformers, with every weight random (transformers' own
initialisation leaves biases at zero and norms at one, which hides mistakes)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROPE = {
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}

_LLAMA_LIKE = {
    "vocab_size": 101,  # prime: no tensor parallel size divides it
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}
_GPT2 = {"vocab_size": 101, "n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 64, "eos_token_id": 7}

# name -> (family, what differs from the above): MHA, GQA, MQA; heads of their own size; tied or not; biases or not;
# windows and rope scaling shorter than the sequences that the tests use.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "llama-gqa": ("llama", {}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 10}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-linear": ("llama", {"rope_parameters": ROPE["linear"]}),
    "llama-dynamic": ("llama", {"rope_parameters": ROPE["dynamic"], "max_position_embeddings": 8}),
    "llama-yarn": ("llama", {"rope_parameters": ROPE["yarn"]}),
    "llama-llama3": ("llama", {"rope_parameters": ROPE["llama3"]}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen2-gqa": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2-yarn-mqa": ("qwen2", {"num_key_value_heads": 1, "rope_parameters": ROPE["yarn"]}),
    "qwen3-gqa": ("qwen3", {"head_dim": 14}),
    "qwen3-bias-tied": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-windows": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2-tied": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 60, "activation_function": "gelu"}),
}


def tiny_config(case: str, **overrides: Any) -> dict[str, Any]:
    family, changes = CASES[case]
    return {"model_type": family, **(_GPT2 if family == "gpt2" else _LLAMA_LIKE), **changes, **overrides}


def save_tiny(directory: Path, case: str, **overrides: Any) -> PreTrainedModel:
    """Writes the checkpoint; returns the reference, float32, attention computed eagerly."""
    config = tiny_config(case, **overrides)
    torch.manual_seed(sum(map(ord, case)))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.15
            parameter.copy_(1 + noise if parameter.dim() == 1 and not name.endswith("bias") else noise)
    model.save_pretrained(directory)
    return model


def save_with_outliers(directory: Path, factors: Sequence[float] = (100.0, 0.01, 0.01)) -> None:
    """A model whose function stays what it is while 2 of 48 channels after each norm become `factors` times as large,
    layer by layer, and the weights that read them as much smaller."""
    save_tiny(directory, "llama-gqa")
    tensors = load_file(directory / "model.safetensors")
    for layer, factor in enumerate(factors):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"model.layers.{layer}.{norm}.weight"][[5, 17]] *= factor
            for reader in readers:
                tensors[f"model.layers.{layer}.{reader}.weight"][:, [5, 17]] /= factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def save_with_outliers_on_the_way_out(directory: Path) -> None:
    """Another such model: of attention's output, whose weights no norm precedes, 2 columns are 100 times as large."""
    save_tiny(directory, "llama-gqa")
    tensors = load_file(directory / "model.safetensors")
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        tensors[f"{attention}.v_proj.weight"][3] /= 100  # of the first of three heads, which two heads of queries read
        tensors[f"{attention}.o_proj.weight"][:, [3, 11]] *= 100
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
