"""The parts of a decoder block. Single device: no rank, no mesh, no quantization inside.

Head counts are read from the tensors, never from the spec, so that a part works the same on a slice of its heads.
Letters: T tokens, D hidden, F feed-forward, H query heads, K kv heads, E head_dim.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayllm.models.context import ForwardContext
from rayllm.models.rope import Rotation
from rayllm.models.spec import Activation, DecoderSpec
from rayllm_kernels import add_rms_norm, linear, rms_norm, silu_mul

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019). Accumulates in float32 and rounds before the weight, as
    transformers does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer whose product, where no gradient is asked for, is that of the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def make_norm(spec: DecoderSpec) -> nn.Module:
    if spec.norm == "layernorm":
        return nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)
    return RMSNorm(spec.hidden_size, spec.norm_eps)


def add_norm(norm: nn.Module, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> (norm(residual + x), residual + x). `residual` None: zero."""
    if residual_TD is None:
        return norm(x_TD), x_TD
    if isinstance(norm, RMSNorm):
        return add_rms_norm(x_TD, residual_TD, norm.weight, norm.eps)
    summed_TD = residual_TD + x_TD
    return norm(summed_TD), summed_TD


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = spec.head_dim
        self.scale = spec.head_dim**-0.5
        self.window = spec.windows[layer]
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, query_size, bias=spec.qkv_bias)
        self.k_proj = Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.v_proj = Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.o_proj = Linear(query_size, spec.hidden_size, bias=spec.o_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def forward(self, x_TD: Tensor, rotation: Rotation | None, context: ForwardContext) -> Tensor:
        q_THE, k_TKE, v_TKE = self.project(x_TD)
        if self.q_norm is not None and self.k_norm is not None:
            q_THE, k_TKE = self.q_norm(q_THE), self.k_norm(k_TKE)
        out_THE = context.attend(self.layer, q_THE, k_TKE, v_TKE, rotation, scale=self.scale, window=self.window)
        output: Tensor = self.o_proj(out_THE.flatten(1))
        return output

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> q_THE, k_TKE, v_TKE."""
        shape = (x_TD.shape[0], -1, self.head_dim)
        q_THE = self.q_proj(x_TD).view(shape)
        k_TKE = self.k_proj(x_TD).view(shape)
        v_TKE = self.v_proj(x_TD).view(shape)
        return q_THE, k_TKE, v_TKE


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.gate_proj = Linear(spec.hidden_size, spec.ffn_size, bias=spec.mlp_bias)
        self.up_proj = Linear(spec.hidden_size, spec.ffn_size, bias=spec.mlp_bias)
        self.down_proj = Linear(spec.ffn_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        output: Tensor = self.down_proj(gated(self.activation, self.gate_proj(x_TD), self.up_proj(x_TD)))
        return output


def gated(activation: Callable[[Tensor], Tensor], gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return silu_mul(gate_TF, up_TF) if activation is F.silu else activation(gate_TF) * up_TF


class Mlp(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.up_proj = Linear(spec.hidden_size, spec.ffn_size, bias=spec.mlp_bias)
        self.down_proj = Linear(spec.ffn_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.activation(self.up_proj(x_TD)))
        return output


class Block(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(spec)
        self.self_attn = Attention(spec, layer)
        self.post_attention_layernorm = make_norm(spec)
        self.mlp: nn.Module = GatedMlp(spec) if spec.gated_mlp else Mlp(spec)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, rotation: Rotation | None, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """The residual stream is `residual + x`, so that each sum is taken together with the norm that follows it."""
        x_TD, residual_TD = add_norm(self.input_layernorm, x_TD, residual_TD)
        x_TD = self.self_attn(x_TD, rotation, context)
        x_TD, residual_TD = add_norm(self.post_attention_layernorm, x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD
