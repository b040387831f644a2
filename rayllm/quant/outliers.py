"""Which columns of a layer's input keep 16 bits (LLM.int8(), Dettmers et al. 2022).

The paper's threshold, an activation of 6, belongs to models of its time; here a column is an outlier when its inputs or
its weights are some times the median column's. On SmolLM2-135M 6, 4 and 3 times cost 1.7, 1.0 and 0.5 % of perplexity.

Other readers look for such columns in the int8 weights, where they share the others' range. There larger weights may
cost all the others their resolution, and smaller ones, which large inputs meet, may have none themselves: `even_out`
makes them more like the others where that is better for all, and changes the inputs instead, which 16 bits do not
mind. The factors are powers of two, so that neither the columns kept nor the norms lose a bit.
Letters: N outputs, K inputs of a layer, J outlier columns.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from rayllm.models.spec import DecoderSpec
from rayllm.quant.ranges import absmax_scale, round_to_int8
from rayllm.quant.smooth import LARGEST, Folds, input_sources

THRESHOLD = 3.0
_MOST = 16  # of K: one column in so many, lest 16 bits for all be the better choice


def outlier_columns(largest_K: Sequence[Tensor]) -> Tensor:
    """-> int32 [J], sorted. `largest_K`: of each column the largest input, the largest weight of one layer, of..."""
    excess_K = torch.stack([one / one.median().clamp(min=1e-12) for one in largest_K]).amax(dim=0)
    most = -(-len(excess_K) // _MOST)
    found = excess_K.topk(most).indices
    return found[excess_K[found] > THRESHOLD].sort().values.to(torch.int32)


def input_groups(spec: DecoderSpec) -> list[list[str]]:
    """The layers of each block that read the same input, which must agree on its outliers to be fused; the head."""
    groups: list[list[str]] = []
    for layer in range(spec.num_layers):
        block = f"layers.{layer}"
        groups.append([f"{block}.self_attn.{part}_proj" for part in "qkv"])
        groups.append([f"{block}.self_attn.o_proj"])
        groups.append([f"{block}.mlp.{part}_proj" for part in (("gate", "up") if spec.gated_mlp else ("up",))])
        groups.append([f"{block}.mlp.down_proj"])
    return [*groups, ["lm_head"]]


def split_groups(spec: DecoderSpec, int8: Collection[str]) -> list[list[str]]:
    """The layers that share an input of which some are `int8` and some not: vLLM, which joins them, refuses that."""
    return [group for group in input_groups(spec) if 0 < sum(layer in int8 for layer in group) < len(group)]


def shared_columns(spec: DecoderSpec, largest: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """`largest`: by layer as `outlier_columns` wants it, for the layers that become int8."""
    columns: dict[str, Tensor] = {}
    for group in input_groups(spec):
        layers = [layer for layer in group if layer in largest]
        if layers:
            columns |= dict.fromkeys(layers, outlier_columns([one for layer in layers for one in largest[layer]]))
    return columns


def even_out(
    spec: DecoderSpec,
    columns: Mapping[str, Tensor],
    read_weight: Callable[[str], Tensor],
    energies: Mapping[str, Tensor],
    *,
    head: bool,
) -> Folds:
    """The outlier `columns` get weights more like the median column's, where a factor can go before the layer: by all
    that they exceed it, by its root, or not at all, whatever costs least as others read the int8 weights.

    `energies`: mean squares of the inputs [K] by layer, none if nothing is known. `head`: as for `input_sources`.
    """
    folds = Folds()
    for source, layers in input_sources(spec, head=head):
        int8 = [layer for layer in layers if layer in columns]
        if int8:
            weights = [read_weight(layer).float() for layer in int8]
            largest_K = torch.stack([weight_NK.abs().amax(dim=0) for weight_NK in weights]).amax(dim=0)
            excess_K = torch.ones_like(largest_K)
            columns_J = columns[int8[0]].long()
            excess_K[columns_J] = largest_K[columns_J] / largest_K.median().clamp(min=1e-12)
            candidates = [
                (excess_K**power).clamp(1 / LARGEST, LARGEST).log2().round().neg().exp2() for power in (0, 0.5, 1)
            ]
            energy_K = energies.get(int8[0], torch.ones_like(largest_K))
            errors = [_error_of_int8(weights, factors_K, energy_K) for factors_K in candidates]
            factors_K = candidates[errors.index(min(errors))]
            folds.rows[source] = factors_K
            folds.columns.update(dict.fromkeys(layers, factors_K))
    return folds


def _error_of_int8(weights: Sequence[Tensor], factors_K: Tensor, energy_K: Tensor) -> float:
    """Squared, of all outputs, where columns are multiplied by the factors and inputs divided by them."""
    error = 0.0
    for weight_NK in weights:
        moved_NK = weight_NK * factors_K
        scale_N1 = absmax_scale(moved_NK)
        off_NK = (round_to_int8(moved_NK, scale_N1) * scale_N1 - moved_NK) / factors_K
        error += float((off_NK.square() @ energy_K).sum())
    return error
