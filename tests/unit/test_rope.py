"""Frequencies against transformers' own functions, with the settings of real models."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rayllm.models.families import spec_from_config
from rayllm.models.rope import RotaryEmbedding
from tests.tiny_models import tiny_config

SETTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {  # head_dim, max_position_embeddings, parameters
    "smollm2": (64, 8192, {"rope_type": "default", "rope_theta": 100000.0}),
    "llama-3.1": (
        128,
        131072,
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "linear": (128, 16384, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "qwen2.5-yarn": (
        128,
        32768,
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    "yarn-deepseek": (
        64,
        163840,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    ),
    "yarn-options": (
        80,
        65536,
        {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 2048,
            "attention_factor": 1.3,
            "truncate": False,
        },
    ),
    "yarn-below-one-rotation": (
        8,
        64,
        {"rope_type": "yarn", "rope_theta": 10.0, "factor": 2.0, "original_max_position_embeddings": 4},
    ),
    "dynamic": (96, 2048, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
}


def configs(name: str) -> tuple[LlamaConfig, dict[str, Any]]:
    head_dim, max_positions, parameters = SETTINGS[name]
    ours = tiny_config(
        "llama-gqa", head_dim=head_dim, max_position_embeddings=max_positions, rope_parameters=dict(parameters)
    )
    theirs = {key: value for key, value in ours.items() if key != "model_type"}
    return LlamaConfig(**{**theirs, "rope_parameters": dict(parameters)}), ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", [17, 5000])
def test_rotation_equals_transformers(name: str, length: int) -> None:
    reference, ours = configs(name)
    spec = spec_from_config(ours)
    assert spec.rope is not None
    positions = torch.arange(length)
    generator = torch.Generator().manual_seed(0)
    q_THE = torch.randn(length, 2, spec.head_dim, generator=generator, dtype=torch.float32)
    cos, sin = LlamaRotaryEmbedding(reference)(q_THE, positions[None])
    expected, _ = apply_rotary_pos_emb(q_THE.transpose(0, 1)[None], q_THE.transpose(0, 1)[None], cos, sin)

    lengths = torch.full((length,), length)
    rotation = RotaryEmbedding(spec.rope, spec.head_dim).rotation(positions, lengths, torch.float32)
    # At position 5000 one rounding of a frequency turns an angle by 5000 * 2**-24 = 3e-4.
    q_rotated, k_rotated = rotation.apply(q_THE, q_THE[:, :1])
    atol = length * 2.0**-22
    torch.testing.assert_close(q_rotated, expected[0].transpose(0, 1), rtol=0, atol=atol)
    torch.testing.assert_close(k_rotated, expected[0, :1].transpose(0, 1), rtol=0, atol=atol)


def test_each_token_has_the_angles_of_its_own_length() -> None:
    _, config = configs("dynamic")
    spec = spec_from_config(config)
    assert spec.rope is not None
    rotary, positions = RotaryEmbedding(spec.rope, spec.head_dim), torch.tensor([100, 3000, 100])
    mixed = rotary.rotation(positions, torch.tensor([2048, 4096, 3001]), torch.float32)
    for row, length in enumerate((2048, 4096, 3001)):
        alone = rotary.rotation(positions[row : row + 1], torch.tensor([length]), torch.float32)
        torch.testing.assert_close(mixed.cos_TE[row : row + 1], alone.cos_TE)
    assert (mixed.cos_TE[0] - mixed.cos_TE[2]).abs().max() > 0.1
    unscaled = rotary.rotation(positions, None, torch.float32)
    torch.testing.assert_close(mixed.cos_TE[0], unscaled.cos_TE[0])


def test_angles_stay_float32_on_the_meta_device_and_in_bfloat16() -> None:
    spec = spec_from_config(configs("smollm2")[1])
    assert spec.rope is not None
    positions = torch.tensor([8001])
    expected = RotaryEmbedding(spec.rope, spec.head_dim).rotation(positions, None, torch.float32)
    with torch.device("meta"):
        built_on_meta = RotaryEmbedding(spec.rope, spec.head_dim)
    rotation = built_on_meta.rotation(positions, None, torch.bfloat16)
    assert rotation.cos_TE.device.type == "cpu"
    torch.testing.assert_close(rotation.cos_TE, expected.cos_TE.bfloat16(), rtol=0, atol=0)
