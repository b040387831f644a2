"""What distinguishes one decoder from another, as plain data.

Knows nothing of torch, of checkpoints or of how a family spells its configuration (`rayllm.models.families`).
"""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary positions (Su et al. 2021) and how they are stretched past the length that the model was trained on.

    `original_max_position_embeddings` is that length; only dynamic, yarn and llama3 look at it. `attention_factor`
    multiplies cos and sin (yarn's "mscale"; 1 elsewhere).
    """

    type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """A causal decoder: pre-norm blocks of attention and MLP, a last norm and a head.

    `rope` None: learned positions. `windows[layer]` is the number of keys that a query sees, itself included; None: all
    before it. Dropout is no part of a spec: the decoder has none, in training either.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Norm
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    rope: RopeSpec | None
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]

    @property
    def num_params(self) -> int:
        """Weights of the whole model; a tied head counts once."""
        hidden, query, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norm = hidden * (2 if self.norm == "layernorm" else 1)
        attention = hidden * (query + 2 * kv) + query * hidden
        attention += (query + 2 * kv) * self.qkv_bias + hidden * self.o_bias + 2 * self.head_dim * self.qk_norm
        inner = 2 if self.gated_mlp else 1
        mlp = (inner + 1) * hidden * self.ffn_size + (inner * self.ffn_size + hidden) * self.mlp_bias
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        if self.rope is None:
            embeddings += self.max_position_embeddings * hidden
        return embeddings + self.num_layers * (attention + mlp + 2 * norm) + norm

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that one token takes in the KV cache of the whole model, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes
