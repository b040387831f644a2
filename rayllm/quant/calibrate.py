"""What the inputs of a model's linear layers look like on some text.

Letters: T tokens, R of them that are kept as a sample, K inputs of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.quant.int8_linear import linear_names

SAMPLE = 512  # tokens


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of the inputs of one layer: `largest_K` absolute value and `energy_K`, the mean square, of each over all tokens
    (float32), and the inputs of some tokens themselves, `sample_RK`, evenly spread over the text.
    """

    largest_K: Tensor
    energy_K: Tensor
    sample_RK: Tensor


class _Watch:
    """A forward pre-hook that sees all inputs of one layer."""

    def __init__(self, tokens: int) -> None:
        self._every = -(-tokens // SAMPLE)
        self._tokens = 0
        self._largest_K, self._squares_K = torch.zeros(()), torch.zeros(())
        self._sample: list[Tensor] = []

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_TK = inputs[0].float()
        self._largest_K = torch.maximum(self._largest_K.to(x_TK.device), x_TK.abs().amax(dim=0))
        self._squares_K = self._squares_K.to(x_TK.device) + x_TK.square().sum(dim=0)
        self._sample.append(inputs[0][-self._tokens % self._every :: self._every].cpu())
        self._tokens += len(x_TK)

    def statistics(self) -> InputStatistics:
        return InputStatistics(
            self._largest_K.cpu(), self._squares_K.cpu() / self._tokens, torch.cat(self._sample).float()
        )


@torch.inference_mode()
def calibrate(
    model: Decoder, sequences: Sequence[Tensor], *, advance: Callable[[int], None] = lambda tokens: None
) -> Mapping[str, InputStatistics]:
    """By layer name. `model` is whole, on one device; `sequences` are token ids [T], seen each from its own start."""
    tokens = sum(len(ids_T) for ids_T in sequences)
    watches = {name: _Watch(tokens) for name in linear_names(model)}
    hooks = [model.get_submodule(name).register_forward_pre_hook(watch) for name, watch in watches.items()]
    try:
        for ids_T in sequences:
            context = DenseContext([0, len(ids_T)])
            model.logits(model(ids_T, torch.arange(len(ids_T), device=ids_T.device), context))
            advance(len(ids_T))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: watch.statistics() for name, watch in watches.items()}
