"""What the inputs of a model's linear layers look like on some text.

Letters: T tokens, K inputs of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.quant.int8_linear import linear_names


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of each input of one layer over all tokens: the largest absolute value, and the mean square. float32 [K]."""

    largest_K: Tensor
    energy_K: Tensor


@torch.inference_mode()
def calibrate(
    model: Decoder, sequences: Sequence[Tensor], *, advance: Callable[[int], None] = lambda tokens: None
) -> Mapping[str, InputStatistics]:
    """By layer name. `model` is whole, on one device; `sequences` are token ids [T], seen each from its own start."""
    largest: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TK = inputs[0].float()
            bound_K, square_K = x_TK.abs().amax(dim=0), x_TK.square().sum(dim=0)
            largest[name] = torch.maximum(largest[name], bound_K) if name in largest else bound_K
            squares[name] = squares[name] + square_K if name in squares else square_K

        return see

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in linear_names(model)]
    try:
        for ids_T in sequences:
            context = DenseContext([0, len(ids_T)])
            model.logits(model(ids_T, torch.arange(len(ids_T), device=ids_T.device), context))
            advance(len(ids_T))
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(ids_T) for ids_T in sequences)
    return {name: InputStatistics(largest[name].cpu(), squares[name].cpu() / tokens) for name in largest}
