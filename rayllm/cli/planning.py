"""How much memory a model needs, and how it splits over GPUs: arithmetic alone, no torch, nothing is loaded.

Byte counts are exact for the weights and the KV cache. Training activations are the estimate of Korthikanti et al.
2022 (arXiv:2205.05198); what a framework and its kernels need besides is not counted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rayllm.core.errors import ConfigError
from rayllm.models.spec import DecoderSpec
from rayllm.parallel.plan import check_layout, local_kv_heads, local_vocab_size

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Mixed-precision AdamW (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1): 16-bit weights and gradients, float32
# master weights and two moments.
ADAMW_BYTES_PER_PARAM = 2 + 2 + 4 + 4 + 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to split a model. The byte counts are those of the rank that holds most.

    `kv_copies`: how many ranks hold each KV head (more than 1 where there are fewer heads than tensor ranks).
    """

    tp: int
    pp: int
    kv_copies: int
    weights_bytes: int
    kv_bytes_per_token: int
    kv_room_bytes: int  # negative: the weights alone do not fit

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    @property
    def max_tokens(self) -> int:
        """Tokens of context, over all sequences, that the KV cache can hold."""
        return max(0, self.kv_room_bytes // self.kv_bytes_per_token)

    def max_batch(self, context: int) -> int:
        return self.max_tokens // context


def even_layouts(spec: DecoderSpec, *, dtype_bytes: int, gpu_bytes: int, fraction: float, gpus: int) -> list[Layout]:
    """The TP x PP layouts of at most `gpus` GPUs that give every rank the same heads, ffn columns and layers.

    `fraction` of each GPU's memory is for weights and KV cache.
    """
    return [
        Layout(
            tp=tp,
            pp=pp,
            kv_copies=max(1, tp // spec.num_kv_heads),
            weights_bytes=(weights := max_rank_params(spec, tp, pp) * dtype_bytes),
            kv_bytes_per_token=2 * local_kv_heads(spec, tp) * spec.head_dim * (spec.num_layers // pp) * dtype_bytes,
            kv_room_bytes=int(gpu_bytes * fraction) - weights,
        )
        for tp, pp in _even_sizes(spec, gpus)
    ]


def _even_sizes(spec: DecoderSpec, gpus: int) -> Iterator[tuple[int, int]]:
    for tp in range(1, gpus + 1):
        for pp in range(1, gpus // tp + 1):
            if spec.num_layers % pp == 0 and _is_possible(spec, tp, pp):
                yield tp, pp


def _is_possible(spec: DecoderSpec, tp: int, pp: int) -> bool:
    try:
        check_layout(spec, tp, pp)
    except ConfigError:
        return False
    return True


def max_rank_params(spec: DecoderSpec, tp: int, pp: int) -> int:
    """Parameters on the rank that holds most. `tp` and `pp` must be an even layout; the vocabulary is padded to it.

    Matrices are divided by `tp`; norms and biases of row-parallel matrices are whole on every rank. The embedding is on
    the first stage, the output matrix on the last; a tied one is on both.
    """
    layers = spec.num_layers // pp * _layer_params(spec, tp)
    vocab = local_vocab_size(spec, tp) * spec.hidden_size
    positions = 0 if spec.rope is not None else spec.max_position_embeddings * spec.hidden_size
    first = vocab + positions
    last = _norm_params(spec) + (0 if pp == 1 and spec.tie_word_embeddings else vocab)
    return layers + (first + last if pp == 1 else max(first, last))


def _layer_params(spec: DecoderSpec, tp: int) -> int:
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads // tp + local_kv_heads(spec, tp))
    qkv_bias = (spec.num_heads // tp + 2 * local_kv_heads(spec, tp)) * spec.head_dim if spec.qkv_bias else 0
    o_bias = spec.hidden_size if spec.o_bias else 0
    qk_norm = 2 * spec.head_dim if spec.qk_norm else 0
    columns = (2 if spec.gated_mlp else 1) * spec.ffn_size // tp
    mlp = columns * spec.hidden_size + spec.ffn_size // tp * spec.hidden_size
    mlp_bias = columns + spec.hidden_size if spec.mlp_bias else 0
    return attention + qkv_bias + o_bias + qk_norm + mlp + mlp_bias + 2 * _norm_params(spec)


def _norm_params(spec: DecoderSpec) -> int:
    return spec.hidden_size * (2 if spec.norm == "layernorm" else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What the number of parameters alone decides."""

    num_params: int
    dtype: str
    gpu_bytes: int

    @property
    def bytes_per_param(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def weights_bytes(self) -> int:
        return self.num_params * self.bytes_per_param

    @property
    def gpus(self) -> int:
        return math.ceil(self.weights_bytes / self.gpu_bytes)

    @property
    def training_bytes(self) -> int:
        return self.num_params * ADAMW_BYTES_PER_PARAM

    @property
    def training_gpus(self) -> int:
        return math.ceil(self.training_bytes / self.gpu_bytes)

    def as_json(self) -> dict[str, object]:
        return {
            "params": self.num_params,
            "dtype": self.dtype,
            "bytes_per_param": self.bytes_per_param,
            "weights_gb": self.weights_bytes / 1e9,
            "gpu_memory_gb": self.gpu_bytes / 1e9,
            "gpus": self.gpus,
            "training": {
                "bytes_per_param": ADAMW_BYTES_PER_PARAM,
                "state_gb": self.training_bytes / 1e9,
                "gpus": self.training_gpus,
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """What a model's shape decides besides. `best` is the smallest layout that holds a sequence of `context` tokens."""

    spec: DecoderSpec
    memory: MemoryPlan
    fraction: float
    context: int
    layouts: list[Layout]

    @property
    def kv_bytes_per_token(self) -> int:
        return self.spec.kv_bytes_per_token(self.memory.bytes_per_param)

    @property
    def best(self) -> Layout | None:
        fitting = [layout for layout in self.layouts if layout.max_tokens >= self.context]
        return min(fitting, key=lambda layout: (layout.gpus, -layout.max_tokens), default=None)

    def activation_bytes(self, *, recompute: bool) -> int:
        """Of a training step over one sequence, in 16 bits: 34 bytes per token, hidden unit and layer, or the layers'
        inputs alone (2 bytes) when each layer is recomputed in the backward pass. Equation 2 of the paper without its
        5as/h term: a fused attention kernel never stores the scores.
        """
        return (2 if recompute else 34) * self.context * self.spec.hidden_size * self.spec.num_layers

    def as_json(self) -> dict[str, object]:
        best = self.best
        return {
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "context": self.context,
            "kv_gb_per_sequence": self.context * self.kv_bytes_per_token / 1e9,
            "gpu_memory_fraction": self.fraction,
            "activations_gb": self.activation_bytes(recompute=False) / 1e9,
            "activations_recompute_gb": self.activation_bytes(recompute=True) / 1e9,
            "largest": None
            if best is None
            else {
                "tp": best.tp,
                "pp": best.pp,
                "context": self.context,
                "batch": best.max_batch(self.context),
                "tokens": best.max_tokens,
            },
            "layouts": [
                {
                    "tp": layout.tp,
                    "pp": layout.pp,
                    "gpus": layout.gpus,
                    "kv_copies": layout.kv_copies,
                    "weights_gb_per_gpu": layout.weights_bytes / 1e9,
                    "kv_bytes_per_token_per_gpu": layout.kv_bytes_per_token,
                    "tokens": layout.max_tokens,
                    "batch": layout.max_batch(self.context),
                }
                for layout in self.layouts
            ],
        }


def plan_model(
    spec: DecoderSpec, *, dtype: str, gpu_bytes: int, fraction: float, context: int | None, max_gpus: int | None
) -> ModelPlan:
    """`context` None: the model's longest. `max_gpus` None: 8, or twice what the weights need."""
    memory = MemoryPlan(num_params=spec.num_params, dtype=dtype, gpu_bytes=gpu_bytes)
    return ModelPlan(
        spec=spec,
        memory=memory,
        fraction=fraction,
        context=context or spec.max_position_embeddings,
        layouts=even_layouts(
            spec,
            dtype_bytes=memory.bytes_per_param,
            gpu_bytes=gpu_bytes,
            fraction=fraction,
            gpus=max_gpus or max(8, 2 * memory.gpus),
        ),
    )
