"""SmoothQuant (Xiao et al. 2022): move the spread of activations into the weights, where each output has its scale.

A layer's input j is divided by s[j] and its weights for j are multiplied by it: the product stays what it was. Dividing
costs nothing where the input comes out of something linear: a norm (its weight and bias), or, for the way down of a
gated MLP, the rows of its way up. The s are not rounded to powers of two, which would fold without any loss: what a
16-bit norm loses is far less than what activations lose by factors that miss by up to the root of two (SmolLM2-135M,
W8A8, 1024 tokens each: KL divergence 1.5 % on English and 1.8 % on Korean with exact factors, 1.5 and 2.2 % with powers
of two).

How much of the spread moves, the paper's alpha, is tried out on a sample of inputs for each set of layers that share
them, as AWQ (Lin et al. 2023) does; so weights that meet large inputs get a finer grid in W8A16 too. The spread is that
of the inputs' root mean squares, not of their largest values as in the paper: a row has a scale of its own anyway, and
a few tokens with huge inputs of the way down (attention sinks) would decide for all the others (SmolLM2-135M, W8A8, KL
divergence on 1024 tokens of text apart from the calibration and from what tests evaluate: 1.47 % on English and 1.66 %
on Korean by the largest values, 1.33 and 1.49 % so; 1.60 and 1.96 % where 128 tokens, not 512, decide).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllm.models.quantization import Scheme
from rayllm.models.spec import DecoderSpec
from rayllm.quant.calibrate import InputStatistics
from rayllm.quant.ranges import absmax_scale, round_to_int8
from rayllm_kernels import quantize_rows_reference

ALPHAS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LARGEST = 2.0**12  # of a factor, and one over the smallest


@dataclass(frozen=True, slots=True)
class Folds:
    """`columns`: layer -> factors of its inputs [K]. `rows`: module (norm or layer) -> divisors of its outputs [N]."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, module: str, parameter: Tensor) -> Tensor:
        """What the parameter (a weight or bias) of `module` becomes, in float32 where anything changes."""
        if (rows_N := self.rows.get(module)) is not None:
            parameter = parameter.float() / (rows_N[:, None] if parameter.dim() == 2 else rows_N)
        if (columns_K := self.columns.get(module)) is not None and parameter.dim() == 2:
            parameter = parameter.float() * columns_K
        return parameter


def input_sources(spec: DecoderSpec, *, head: bool) -> list[tuple[str, list[str]]]:
    """Each module whose output, up to something linear, is the input of some layers, and all those layers; the way out
    of attention has none. `head`: whether it has weights of its own, which the embedding does not share."""
    sources: list[tuple[str, list[str]]] = [("norm", ["lm_head"])] if head else []
    for layer in range(spec.num_layers):
        block = f"layers.{layer}"
        attention = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
        gate = [f"{block}.mlp.gate_proj"] if spec.gated_mlp else []
        up, down = f"{block}.mlp.up_proj", f"{block}.mlp.down_proj"
        sources.append((f"{block}.input_layernorm", attention))
        sources.append((f"{block}.post_attention_layernorm", [*gate, up]))
        if spec.gated_mlp:
            sources.append((up, [down]))
    return sources


def smoothing(
    spec: DecoderSpec,
    scheme: Scheme,
    statistics: Mapping[str, InputStatistics],
    read_weight: Callable[[str], Tensor],
    *,
    head: bool,
) -> Folds:
    """`read_weight`: by layer name -> [N, K]. `head`: as for `input_sources`."""
    folds = Folds()
    for source, layers in input_sources(spec, head=head):
        factors_K = _best_factors([read_weight(name).float() for name in layers], statistics[layers[0]], scheme)
        folds.rows[source] = factors_K
        folds.columns.update(dict.fromkeys(layers, factors_K))
    return folds


def _best_factors(weights: Sequence[Tensor], inputs: InputStatistics, scheme: Scheme) -> Tensor:
    """-> [K], of the candidates the one with the least squared error of all outputs on the sample."""
    weights_K = torch.stack([weight_NK.abs().amax(dim=0) for weight_NK in weights]).amax(dim=0)
    candidates = [_factors(inputs.energy_K.sqrt(), weights_K, alpha) for alpha in ALPHAS]
    errors = [_output_error(weights, inputs.sample_RK, factors_K, scheme) for factors_K in candidates]
    return candidates[errors.index(min(errors))]


def _factors(inputs_K: Tensor, weights_K: Tensor, alpha: float) -> Tensor:
    if alpha == 0:
        return torch.ones_like(inputs_K)
    factors_K = torch.where((inputs_K > 0) & (weights_K > 0), inputs_K**alpha / weights_K ** (1 - alpha), 1.0)
    return factors_K.clamp(1 / LARGEST, LARGEST)


def _output_error(weights: Sequence[Tensor], sample_RK: Tensor, factors_K: Tensor, scheme: Scheme) -> float:
    x_RK = sample_RK / factors_K
    if scheme == "w8a8":
        q_RK, scale_R1 = quantize_rows_reference(x_RK)
        x_RK = q_RK * scale_R1
    error = 0.0
    for weight_NK in weights:
        moved_NK = weight_NK * factors_K
        scale_N1 = absmax_scale(moved_NK)
        stored_NK = round_to_int8(moved_NK, scale_N1) * scale_N1
        error += float((x_RK @ stored_NK.T - sample_RK @ weight_NK.T).square().sum())
    return error
