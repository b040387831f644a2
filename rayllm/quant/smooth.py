"""SmoothQuant (Xiao et al. 2022): move the spread of activations into the weights, where each output has its scale.

A layer's input j is divided by s[j] and its weights for j are multiplied by it: the product stays what it was. Dividing
costs nothing where the input comes out of something linear: a norm (its weight and bias), or, for the way down of a
gated MLP, the rows of its way up. The s are powers of two, so that folding them rounds nothing in any float dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllm.models.spec import DecoderSpec
from rayllm.quant.calibrate import InputStatistics

ALPHA = 0.5  # how much of the spread moves: the paper's value for most models


@dataclass(frozen=True, slots=True)
class Folds:
    """`columns`: layer -> factors of its inputs [K]. `rows`: module (norm or layer) -> divisors of its outputs [N]."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, module: str, parameter: Tensor) -> Tensor:
        """What the parameter (a weight or bias) of `module` becomes, in its own dtype."""
        if (rows_N := self.rows.get(module)) is not None:
            parameter = parameter / (rows_N[:, None] if parameter.dim() == 2 else rows_N).to(parameter.dtype)
        if (columns_K := self.columns.get(module)) is not None and parameter.dim() == 2:
            parameter = parameter * columns_K.to(parameter.dtype)
        return parameter


def smoothing(
    spec: DecoderSpec, statistics: Mapping[str, InputStatistics], largest_weights: Mapping[str, Tensor]
) -> Folds:
    """`largest_weights`: of each layer's inputs the largest absolute weight [K], by layer name."""
    folds = Folds()
    for layer in range(spec.num_layers):
        block = f"layers.{layer}"
        attention = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
        gate = [f"{block}.mlp.gate_proj"] if spec.gated_mlp else []
        up, down = f"{block}.mlp.up_proj", f"{block}.mlp.down_proj"
        _fold(folds, f"{block}.input_layernorm", attention, statistics, largest_weights)
        _fold(folds, f"{block}.post_attention_layernorm", [*gate, up], statistics, largest_weights)
        if spec.gated_mlp:
            _fold(folds, up, [down], statistics, largest_weights)
    return folds


def _fold(
    folds: Folds,
    source: str,
    layers: list[str],
    statistics: Mapping[str, InputStatistics],
    largest_weights: Mapping[str, Tensor],
) -> None:
    """`layers` share the output of `source` as their input."""
    inputs_K = statistics[layers[0]].largest_K
    weights_K = torch.stack([largest_weights[layer] for layer in layers]).amax(dim=0)
    factors_K = inputs_K**ALPHA / weights_K ** (1 - ALPHA)
    factors_K = torch.where((inputs_K > 0) & (weights_K > 0), factors_K, 1.0)
    factors_K = torch.exp2(factors_K.log2().round().clamp(-12, 12))
    folds.rows[source] = factors_K
    for layer in layers:
        folds.columns[layer] = factors_K
