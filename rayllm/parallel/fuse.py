"""Fewer, larger matrices for serving: q, k and v in one, gate and up in one.

A step of few tokens is bound by reading the weights and by the number of calls. Applied last, to a rank's own slices,
whether they are int8 or not; layers of different kinds stay apart. Training and calibration want all of them apart.
Letters: T tokens, D hidden, H query heads, K kv heads, E head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayllm.models.decoder import Decoder
from rayllm.models.layers import Attention, Block, GatedMlp, Linear, gated
from rayllm.quant.int8_linear import Int8Linear


class FusedAttention(Attention):
    """Takes over the parts of an `Attention`; q, k and v are views of one product."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.scale, self.window = attention.scale, attention.window
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._heads = [linear.weight.shape[0] // self.head_dim for linear in projections]
        self.qkv_proj = _joined(projections)
        self.o_proj, self.q_norm, self.k_norm = attention.o_proj, attention.q_norm, attention.k_norm

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        q_THE, k_TKE, v_TKE = qkv.split_with_sizes(self._heads, dim=1)
        return q_THE, k_TKE, v_TKE


class FusedGatedMlp(nn.Module):
    """Takes over the parts of a `GatedMlp`."""

    def __init__(self, mlp: GatedMlp) -> None:
        super().__init__()
        self.activation = mlp.activation
        self.gate_up_proj = _joined([mlp.gate_proj, mlp.up_proj])
        self.down_proj = mlp.down_proj

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x_TD).chunk(2, dim=-1)
        output: Tensor = self.down_proj(gated(self.activation, gate, up))
        return output


def fuse_projections(model: Decoder) -> None:
    """Replaces the attentions and gated MLPs of `model`, layer by layer, so that no more than one is held twice."""
    for block in model.layers.values():
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        if _join(attention.q_proj, attention.k_proj, attention.v_proj):
            block.self_attn = FusedAttention(attention)
        if isinstance(mlp, GatedMlp) and _join(mlp.gate_proj, mlp.up_proj):
            block.mlp = FusedGatedMlp(mlp)


def _join(first: nn.Linear, *others: nn.Linear) -> bool:
    if isinstance(first, Int8Linear):
        return all(isinstance(one, Int8Linear) and first.joins(one) for one in others)
    return not any(isinstance(one, Int8Linear) for one in others)


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear whose output is that of `linears`, one after another."""
    int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
    if int8:
        return Int8Linear.joined(int8)
    first, size = linears[0], sum(linear.out_features for linear in linears)
    joined = Linear(first.in_features, size, bias=first.bias is not None, device="meta")
    joined.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]).detach())
    if first.bias is not None:
        joined.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]).detach())
    return joined
