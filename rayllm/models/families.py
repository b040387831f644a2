"""The supported families: how each spells its configuration and names its weights.

A family is a function from a Hugging Face config.json to a `DecoderSpec`, and a table of names. Every value that would
change the computation is either read or refused by name. Defaults are those of transformers' config classes. Knows
nothing of torch; reads no file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from rayllm.core.errors import ConfigError
from rayllm.models.config_fields import ConfigFields
from rayllm.models.quantization import read_quantization
from rayllm.models.rope_config import rope_spec
from rayllm.models.spec import Activation, DecoderSpec
from rayllm.models.weights import Source, WeightNames

ACTIVATIONS = frozenset(get_args(Activation))


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigError naming the field and the value that is missing, malformed or not supported."""
    fields = ConfigFields(config)
    family = FAMILIES[fields.choice("model_type", FAMILIES)]
    read_quantization(config)  # refuses what is not supported
    spec = family.spec(fields)
    if spec.num_heads % spec.num_kv_heads:
        raise ConfigError(
            f"config.json: num_key_value_heads: {spec.num_kv_heads} does not divide {spec.num_heads} attention heads"
        )
    return spec


def weight_names(family: str) -> WeightNames:
    return FAMILIES[family].names


def _llama_like(
    fields: ConfigFields,
    *,
    family: str,
    num_kv_heads: int,
    head_dim: int,
    windows: tuple[int | None, ...],
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderSpec:
    if head_dim % 2 or head_dim < 4:
        raise ConfigError(
            f"config.json: head_dim: {head_dim} is not an even number of at least 4, as rotary positions need"
        )
    max_positions = fields.integer("max_position_embeddings")
    return DecoderSpec(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        ffn_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        norm="rmsnorm",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=cast(Activation, fields.choice("hidden_act", ACTIVATIONS, "silu")),
        gated_mlp=True,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rope=rope_spec(fields, max_positions),
        windows=windows,
        eos_token_ids=_eos_token_ids(fields),
    )


def _llama(fields: ConfigFields) -> DecoderSpec:
    # transformers' llama has no windows; converted configs may carry one that is switched off.
    if fields.get("use_sliding_window") is not False:
        fields.refuse_unless("sliding_window")
    attention_bias = fields.flag("attention_bias", False)
    return _llama_like(
        fields,
        family="llama",
        num_kv_heads=_kv_heads(fields),
        head_dim=_head_dim(fields),
        windows=(None,) * fields.integer("num_hidden_layers"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _mistral(fields: ConfigFields) -> DecoderSpec:
    window = _window(fields)
    num_layers = fields.integer("num_hidden_layers")
    # transformers' mistral ignores layer_types; a config that mixes them was written for another model.
    fields.refuse_unless("layer_types", ["full_attention" if window is None else "sliding_attention"] * num_layers)
    return _llama_like(
        fields,
        family="mistral",
        num_kv_heads=_kv_heads(fields, 8),
        head_dim=_head_dim(fields),
        windows=(window,) * num_layers,
    )


def _qwen2(fields: ConfigFields) -> DecoderSpec:
    return _llama_like(
        fields,
        family="qwen2",
        num_kv_heads=_kv_heads(fields, 32),
        head_dim=_head_dim(fields),
        windows=_qwen_windows(fields),
        qkv_bias=True,
    )


def _qwen3(fields: ConfigFields) -> DecoderSpec:
    attention_bias = fields.flag("attention_bias", False)
    return _llama_like(
        fields,
        family="qwen3",
        num_kv_heads=_kv_heads(fields, 32),
        head_dim=fields.integer("head_dim", 128),
        windows=_qwen_windows(fields),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
    )


def _gpt2(fields: ConfigFields) -> DecoderSpec:
    # reorder_and_upcast_attn only asks for float32 attention scores, which we compute anyway.
    fields.refuse_unless("scale_attn_weights", True)
    fields.refuse_unless("scale_attn_by_inverse_layer_idx", False)
    fields.refuse_unless("add_cross_attention", False)
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    if hidden_size % num_heads:
        raise fields.unsupported("n_head", f"does not divide n_embd {hidden_size}")
    num_layers = fields.integer("n_layer")
    return DecoderSpec(
        family="gpt2",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=fields.integer("n_inner", 4 * hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=fields.integer("n_positions"),
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=cast(Activation, fields.choice("activation_function", ACTIVATIONS, "gelu_new")),
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        rope=None,
        windows=(None,) * num_layers,
        eos_token_ids=_eos_token_ids(fields),
    )


def _head_dim(fields: ConfigFields) -> int:
    explicit = fields.optional_integer("head_dim")
    if explicit is not None:
        return explicit
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise fields.unsupported("num_attention_heads", f"does not divide hidden_size {hidden_size}")
    return hidden_size // num_heads


def _kv_heads(fields: ConfigFields, default: int | None = None) -> int:
    """Null, and missing where there is no default: as many as query heads."""
    if default is None or fields.is_null("num_key_value_heads"):
        default = fields.integer("num_attention_heads")
    return fields.integer("num_key_value_heads", default)


def _window(fields: ConfigFields) -> int | None:
    return None if fields.is_null("sliding_window") else fields.integer("sliding_window", 4096)


def _qwen_windows(fields: ConfigFields) -> tuple[int | None, ...]:
    """`layer_types` says which layers have a window; without it, those from `max_window_layers` on."""
    num_layers = fields.integer("num_hidden_layers")
    window = _window(fields) if fields.flag("use_sliding_window", False) else None
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.unsupported("layer_types", f"must be a list of {num_layers} names")
    for name in layer_types:
        if name not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"config.json: layer_types: {name!r} is not supported (supported: full_attention, sliding_attention)"
            )
    if window is None and "sliding_attention" in layer_types:
        raise fields.unsupported(
            "use_sliding_window", "and sliding_window give no window, but layer_types holds sliding_attention"
        )
    return tuple(window if name == "sliding_attention" else None for name in layer_types)


def _eos_token_ids(fields: ConfigFields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
        raise fields.unsupported("eos_token_id", "must be an integer or a list of integers")
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class Family:
    spec: Callable[[ConfigFields], DecoderSpec]
    names: WeightNames


_LLAMA_NAMES = WeightNames(
    prefix="model.",
    modules={
        "embed_tokens": Source("embed_tokens"),
        "layers.*.input_layernorm": Source("layers.*.input_layernorm"),
        "layers.*.self_attn.q_proj": Source("layers.*.self_attn.q_proj"),
        "layers.*.self_attn.k_proj": Source("layers.*.self_attn.k_proj"),
        "layers.*.self_attn.v_proj": Source("layers.*.self_attn.v_proj"),
        "layers.*.self_attn.o_proj": Source("layers.*.self_attn.o_proj"),
        "layers.*.self_attn.q_norm": Source("layers.*.self_attn.q_norm"),
        "layers.*.self_attn.k_norm": Source("layers.*.self_attn.k_norm"),
        "layers.*.post_attention_layernorm": Source("layers.*.post_attention_layernorm"),
        "layers.*.mlp.gate_proj": Source("layers.*.mlp.gate_proj"),
        "layers.*.mlp.up_proj": Source("layers.*.mlp.up_proj"),
        "layers.*.mlp.down_proj": Source("layers.*.mlp.down_proj"),
        "norm": Source("norm"),
    },
    ignored=r"(.*\.)?rotary_emb\.inv_freq",
)

# gpt2's Conv1D stores its weight as (in, out) and computes q, k and v with one matrix.
_GPT2_NAMES = WeightNames(
    prefix="transformer.",
    modules={
        "embed_tokens": Source("wte"),
        "embed_positions": Source("wpe"),
        "layers.*.input_layernorm": Source("h.*.ln_1"),
        "layers.*.self_attn.q_proj": Source("h.*.attn.c_attn", transposed=True, part=0, parts=3),
        "layers.*.self_attn.k_proj": Source("h.*.attn.c_attn", transposed=True, part=1, parts=3),
        "layers.*.self_attn.v_proj": Source("h.*.attn.c_attn", transposed=True, part=2, parts=3),
        "layers.*.self_attn.o_proj": Source("h.*.attn.c_proj", transposed=True),
        "layers.*.post_attention_layernorm": Source("h.*.ln_2"),
        "layers.*.mlp.up_proj": Source("h.*.mlp.c_fc", transposed=True),
        "layers.*.mlp.down_proj": Source("h.*.mlp.c_proj", transposed=True),
        "norm": Source("ln_f"),
    },
    ignored=r"(.*\.)?attn\.(bias|masked_bias)",
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(_llama, _LLAMA_NAMES),
    "mistral": Family(_mistral, _LLAMA_NAMES),
    "qwen2": Family(_qwen2, _LLAMA_NAMES),
    "qwen3": Family(_qwen3, _LLAMA_NAMES),
    "gpt2": Family(_gpt2, _GPT2_NAMES),
}
