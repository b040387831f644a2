"""config.json's rotary settings -> `RopeSpec`, in both spellings.

transformers 5 writes one object `rope_parameters`; older ones wrote `rope_theta` beside `rope_scaling`. The reading
follows transformers' `RotaryEmbeddingConfigMixin`, the defaults its `ROPE_INIT_FUNCTIONS`.
"""

import math
from typing import cast, get_args

from rayllm.models.config_fields import ConfigFields
from rayllm.models.spec import RopeSpec, RopeType

TYPES = frozenset(get_args(RopeType))
KNOWN = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    }
)


def rope_spec(config: ConfigFields, max_positions: int) -> RopeSpec:
    """Raises ConfigError naming a type or a field that is not supported."""
    config.refuse_unless("partial_rotary_factor", 1, 1.0)
    # rope_scaling wins where both are given, as in transformers.
    rope = config.section("rope_scaling") or config.section("rope_parameters")
    if rope is None:
        return RopeSpec(theta=config.number("rope_theta", 10_000.0))
    rope.refuse_unknown(KNOWN)
    rope.refuse_unless("partial_rotary_factor", 1, 1.0)
    name = "type" if rope.get("rope_type") is None else "rope_type"
    rope_type = cast(RopeType, rope.choice(name, TYPES, "default"))
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    original = config.optional_integer("original_max_position_embeddings")
    if original is None:
        original = rope.integer("original_max_position_embeddings", max_positions)
    match rope_type:
        case "default":
            return RopeSpec(theta=theta)
        case "linear":
            return RopeSpec(type=rope_type, theta=theta, factor=rope.number("factor"))
        case "dynamic":
            # transformers stretches from max_position_embeddings on, whatever original_max_position_embeddings says.
            return RopeSpec(
                type=rope_type,
                theta=theta,
                factor=rope.number("factor"),
                original_max_position_embeddings=max_positions,
            )
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if low >= high:
                raise rope.unsupported("high_freq_factor", f"must be greater than low_freq_factor {low}")
            return RopeSpec(
                type=rope_type,
                theta=theta,
                factor=rope.number("factor"),
                original_max_position_embeddings=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )
        case "yarn":
            factor = rope.number("factor", max_positions / original)
            return RopeSpec(
                type=rope_type,
                theta=theta,
                factor=factor,
                original_max_position_embeddings=original,
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                truncate=rope.flag("truncate", True),
                attention_factor=_yarn_attention_factor(rope, factor),
            )


def _yarn_attention_factor(rope: ConfigFields, factor: float) -> float:
    """YaRN (Peng et al. 2023), section 3.4, with DeepSeek's two mscales where the config gives both."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)
