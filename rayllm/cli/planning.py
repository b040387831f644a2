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
class WeightFormat:
    """How weights lie in memory: all in `dtype`, or the linear layers in int8 with a float32 scale for each output."""

    dtype: str
    int8: bool = False

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def matrix_bytes(self) -> int:
        """Of one weight of a linear layer."""
        return 1 if self.int8 else self.dtype_bytes

    def linear(self, inputs: int, outputs: int, *, bias: bool = False) -> int:
        """-> bytes of a linear layer."""
        scales = 4 * outputs if self.int8 else 0
        return inputs * outputs * self.matrix_bytes + scales + outputs * self.dtype_bytes * bias

    def others(self, params: int) -> int:
        """-> bytes of embeddings and norms."""
        return params * self.dtype_bytes


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


def even_layouts(
    spec: DecoderSpec, *, form: WeightFormat, kv_dtype: str, gpu_bytes: int, fraction: float, gpus: int
) -> list[Layout]:
    """The TP x PP layouts of at most `gpus` GPUs that give every rank the same heads, ffn columns and layers.

    `fraction` of each GPU's memory is for weights and KV cache.
    """
    head_bytes = kv_head_bytes(spec.head_dim, kv_dtype)
    return [
        Layout(
            tp=tp,
            pp=pp,
            kv_copies=max(1, tp // spec.num_kv_heads),
            weights_bytes=(weights := max_rank_bytes(spec, tp, pp, form)),
            kv_bytes_per_token=2 * local_kv_heads(spec, tp) * (spec.num_layers // pp) * head_bytes,
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


def max_rank_bytes(spec: DecoderSpec, tp: int, pp: int, form: WeightFormat) -> int:
    """Weights of the rank that holds most. `tp` and `pp` must be an even layout; the vocabulary is padded to it.

    Matrices are divided by `tp`; norms and biases of row-parallel matrices are whole on every rank. The embedding is on
    the first stage, the head on the last; a tied one is on both, and beside the embedding where it is int8.
    """
    layers = spec.num_layers // pp * _layer_bytes(spec, tp, form)
    vocab = local_vocab_size(spec, tp)
    positions = 0 if spec.rope is not None else spec.max_position_embeddings
    first = form.others((vocab + positions) * spec.hidden_size)
    shared = pp == 1 and spec.tie_word_embeddings and not form.int8
    last = form.others(_norm_params(spec)) + (0 if shared else form.linear(spec.hidden_size, vocab))
    return layers + (first + last if pp == 1 else max(first, last))


def _layer_bytes(spec: DecoderSpec, tp: int, form: WeightFormat) -> int:
    hidden, ffn = spec.hidden_size, spec.ffn_size // tp
    query, kv = (heads * spec.head_dim for heads in (spec.num_heads // tp, local_kv_heads(spec, tp)))
    attention = form.linear(hidden, query + 2 * kv, bias=spec.qkv_bias) + form.linear(query, hidden, bias=spec.o_bias)
    up = form.linear(hidden, ffn * (2 if spec.gated_mlp else 1), bias=spec.mlp_bias)
    down = form.linear(ffn, hidden, bias=spec.mlp_bias)
    norms = 2 * _norm_params(spec) + (2 * spec.head_dim if spec.qk_norm else 0)
    return attention + up + down + form.others(norms)


def _norm_params(spec: DecoderSpec) -> int:
    return spec.hidden_size * (2 if spec.norm == "layernorm" else 1)


def kv_head_bytes(head_dim: int, form: str) -> int:
    """Of one key or value of one head; int8 has a float32 scale beside it."""
    return head_dim + 4 if form == "int8" else head_dim * DTYPE_BYTES[form]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What the number of parameters alone decides; `shape_bytes` of the weights where the model's shape is known, and
    with it the scales of int8 layers and what stays in 16 bits."""

    num_params: int
    form: WeightFormat
    gpu_bytes: int
    shape_bytes: int | None = None

    @property
    def weights_bytes(self) -> int:
        return self.shape_bytes if self.shape_bytes is not None else self.num_params * self.form.matrix_bytes

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
            "dtype": self.form.dtype,
            "int8": self.form.int8,
            "bytes_per_param": self.form.matrix_bytes,
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
    kv_dtype: str
    fraction: float
    context: int
    layouts: list[Layout]

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.spec.num_layers * self.spec.num_kv_heads * kv_head_bytes(self.spec.head_dim, self.kv_dtype)

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
            "kv_dtype": self.kv_dtype,
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
    spec: DecoderSpec,
    *,
    form: WeightFormat,
    kv_dtype: str,
    gpu_bytes: int,
    fraction: float,
    context: int | None,
    max_gpus: int | None,
) -> ModelPlan:
    """`context` None: the model's longest. `max_gpus` None: 8, or twice what the weights need."""
    whole = max_rank_bytes(spec, 1, 1, form)
    memory = MemoryPlan(num_params=spec.num_params, form=form, gpu_bytes=gpu_bytes, shape_bytes=whole)
    return ModelPlan(
        spec=spec,
        memory=memory,
        kv_dtype=kv_dtype,
        fraction=fraction,
        context=context or spec.max_position_embeddings,
        layouts=even_layouts(
            spec,
            form=form,
            kv_dtype=kv_dtype,
            gpu_bytes=gpu_bytes,
            fraction=fraction,
            gpus=max_gpus or max(8, 2 * memory.gpus),
        ),
    )
