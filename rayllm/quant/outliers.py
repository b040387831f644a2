"""Which columns of a layer's input keep 16 bits (LLM.int8(), Dettmers et al. 2022).

The paper's threshold, an activation of 6, belongs to models of its time; here a column is an outlier when its inputs or
its weights are some times the median column's. On SmolLM2-135M 6, 4 and 3 times cost 1.7, 1.0 and 0.5 % of perplexity.

Other readers look for such columns in the int8 weights, where they share the others' range. There larger weights would
cost all the others their resolution, and smaller ones, which large inputs meet, would have none themselves: `even_out`
makes them about as large as the others, and changes the inputs instead, which 16 bits do not mind. The factors are
powers of two, so that neither the columns kept nor the norms lose a bit.
Letters: K inputs of a layer, J outlier columns.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from rayllm.models.spec import DecoderSpec
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
    spec: DecoderSpec, columns: Mapping[str, Tensor], largest_weights: Mapping[str, Tensor], *, head: bool
) -> Folds:
    """The outlier `columns` get weights about as large as the median column's, where a factor can go before the layer.

    `largest_weights`: by layer, of each column [K]. `head`: as for `input_sources`.
    """
    folds = Folds()
    for source, layers in input_sources(spec, head=head):
        int8 = [layer for layer in layers if layer in columns]
        if int8:
            weights_K = torch.stack([largest_weights[layer] for layer in int8]).amax(dim=0)
            columns_J = columns[int8[0]].long()
            excess_J = weights_K[columns_J] / weights_K.median().clamp(min=1e-12)
            factors_J = excess_J.clamp(1 / LARGEST, LARGEST).log2().round().neg().exp2()
            factors_K = torch.ones_like(weights_K).index_copy(0, columns_J, factors_J)
            folds.rows[source] = factors_K
            folds.columns.update(dict.fromkeys(layers, factors_K))
    return folds
