"""config.json -> DecoderSpec: what is read, and what is refused by name."""

from typing import Any

import pytest
from transformers import AutoConfig

from rayllm.core.errors import ConfigError
from rayllm.models.families import spec_from_config
from rayllm.models.spec import RopeSpec
from tests.tiny_models import CASES, tiny_config


def written_by_transformers(case: str, **overrides: Any) -> dict[str, Any]:
    config = tiny_config(case, **overrides)
    result: dict[str, Any] = AutoConfig.for_model(config.pop("model_type"), **config).to_dict()
    return result


@pytest.mark.parametrize("case", CASES)
def test_spec_is_the_same_from_the_short_config_and_from_what_transformers_writes(case: str) -> None:
    spec = spec_from_config(tiny_config(case))
    assert spec == spec_from_config(written_by_transformers(case))
    assert (spec.hidden_size, spec.num_layers, spec.num_heads) == (48, 3, 6)
    assert spec.eos_token_ids == (7,)


def test_published_configs() -> None:
    """Sizes as the model cards give them."""
    llama = {
        "model_type": "llama",
        "attention_bias": False,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    spec = spec_from_config(llama)
    assert spec.num_params == 8_030_261_248
    assert spec.kv_bytes_per_token(2) == 131072
    assert spec.eos_token_ids == (128001, 128008, 128009)
    assert spec.rope == RopeSpec(type="llama3", theta=500000.0, factor=8.0, original_max_position_embeddings=8192)
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
    assert spec_from_config({**gpt2, "n_ctx": 1024, "attn_pdrop": 0.1}).num_params == 124_439_808


def test_both_spellings_of_rope() -> None:
    new = tiny_config("llama-yarn")
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = dict(new["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = {**scaling, "type": scaling.pop("rope_type")}
    assert spec_from_config(old) == spec_from_config(new)
    assert spec_from_config({**tiny_config("llama-gqa"), "rope_theta": 5e4}).rope == RopeSpec(theta=5e4)


def test_windows() -> None:
    base = tiny_config("qwen2-gqa", sliding_window=4)
    assert spec_from_config(base).windows == (None, None, None)
    assert spec_from_config({**base, "use_sliding_window": True, "max_window_layers": 2}).windows == (None, None, 4)
    assert spec_from_config({**base, "use_sliding_window": True, "sliding_window": None}).windows == (None,) * 3
    assert spec_from_config(tiny_config("mistral-window")).windows == (5, 5, 5)
    missing = {key: value for key, value in tiny_config("mistral-full").items() if key != "sliding_window"}
    assert spec_from_config(missing).windows == (4096,) * 3


ROPE = {"rope_type": "linear", "factor": 2.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama-gqa", {"model_type": "mamba"}, "model_type: 'mamba' is not supported (supported: gpt2, llama, mistral"),
    ("llama-gqa", {"model_type": None}, "model_type: is missing"),
    ("llama-gqa", {"hidden_act": "swiglu"}, "hidden_act: 'swiglu' is not supported (supported: gelu"),
    ("llama-gqa", {"hidden_size": "48"}, "hidden_size: '48' must be an integer"),
    ("llama-gqa", {"hidden_size": True}, "hidden_size: True must be an integer"),
    ("llama-gqa", {"num_hidden_layers": 0}, "num_hidden_layers: 0 must be an integer of at least 1"),
    ("llama-gqa", {"vocab_size": None}, "vocab_size: is missing"),
    ("llama-gqa", {"num_attention_heads": 5}, "num_attention_heads: 5 does not divide hidden_size 48"),
    ("llama-gqa", {"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide 6 attention heads"),
    ("llama-gqa", {"head_dim": 9}, "head_dim: 9 is not an even number"),
    ("llama-gqa", {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan must be a positive number"),
    ("llama-gqa", {"attention_bias": "no"}, "attention_bias: 'no' must be true or false"),
    ("llama-gqa", {"eos_token_id": ["x"]}, "eos_token_id: ['x'] must be an integer or a list"),
    ("llama-gqa", {"sliding_window": 16}, "sliding_window: 16 is not supported"),
    ("llama-gqa", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method: 'awq' is not"),
    ("llama-gqa", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ("llama-gqa", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type: 'longrope' is not supported"),
    ("llama-gqa", {"rope_scaling": {"type": "su"}}, "rope_scaling.type: 'su' is not supported"),
    ("llama-gqa", {"rope_scaling": [2.0]}, "rope_scaling: [2.0] must be an object"),
    ("llama-gqa", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: is missing"),
    ("llama-gqa", {"rope_parameters": {**ROPE, "factor": -1}}, "rope_parameters.factor: -1 must be a positive number"),
    ("llama-gqa", {"rope_parameters": {**ROPE, "alpha": 3}}, "rope_parameters.alpha: 3 is not supported"),
    ("llama-gqa", {"rope_parameters": {"full_attention": ROPE}}, "rope_parameters.full_attention: {"),
    ("llama-llama3", {"rope_parameters": {**ROPE, "rope_type": "llama3"}}, "rope_parameters.low_freq_factor: is miss"),
    ("mistral-window", {"layer_types": ["full_attention"] * 3}, "layer_types: ['full_attention'"),
    ("qwen2-gqa", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window: None and sliding_window give no"),
    ("qwen2-gqa", {"layer_types": ["full_attention"]}, "layer_types: ['full_attention'] must be a list of 3 names"),
    ("qwen2-gqa", {"layer_types": ["chunked"] * 3}, "layer_types: 'chunked' is not supported"),
    ("gpt2-tied", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True is not supported"),
    ("gpt2-tied", {"scale_attn_weights": False}, "scale_attn_weights: False is not supported"),
    ("gpt2-tied", {"add_cross_attention": True}, "add_cross_attention: True is not supported"),
    ("gpt2-tied", {"activation_function": "tanh"}, "activation_function: 'tanh' is not supported"),
    ("gpt2-tied", {"n_head": 7}, "n_head: 7 does not divide n_embd 48"),
]


@pytest.mark.parametrize(("case", "change", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_unsupported_values_are_refused_by_name(case: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec_from_config({**tiny_config(case), **change})
    text = str(caught.value)
    assert text.startswith(f"config.json: {message}")
    assert "\n" not in text
