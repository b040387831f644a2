"""AdamW over the parts of the weights that this rank holds.

Each element is updated by itself, so a rank updates its own local tensors, whatever they are a part of, and the result
does not depend on the layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rayllm.models.spec import DecoderSpec
from rayllm.train.config import OptimizerConfig


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of the decoder, as its module holds it, and the part of it that lies here, one memory.

    After `ShardedAdamW.collect` the gradient is that of `local`.
    """

    parameter: nn.Parameter
    local: nn.Parameter


class ShardedAdamW:
    """Moments are float32, as the weights are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], spec: DecoderSpec, config: OptimizerConfig) -> None:
        """`parameters` by their names in the decoder, each once."""
        self.weights = {
            name: Weight(parameter, nn.Parameter(local_part(parameter.detach())))
            for name, parameter in parameters.items()
        }
        decayed = {name for name, parameter in parameters.items() if decays(name, parameter, spec)}
        groups = [
            {"params": [self.weights[name].local for name in decayed], "weight_decay": config.weight_decay},
            {"params": [self.weights[name].local for name in set(parameters) - decayed], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        self._peak = config.learning_rate

    def collect(self) -> list[Tensor]:
        """Takes the gradients from the parameters; -> those of the local parts, which may be changed in place."""
        for weight in self.weights.values():
            gradient, parameter = weight.parameter.grad, weight.parameter
            if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
                # An embedding's, for one, is whole on every tensor rank.
                gradient = gradient.redistribute(placements=parameter.placements)
            weight.local.grad = None if gradient is None else local_part(gradient)
            parameter.grad = None
        return [weight.local.grad for weight in self.weights.values() if weight.local.grad is not None]

    def step(self, rate_share: float) -> float:
        """One update with the gradients that were collected, which are given up. -> the learning rate."""
        rate = self._peak * rate_share
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad()
        return rate

    def moments(self, name: str) -> dict[str, Tensor]:
        """exp_avg, exp_avg_sq [as the local part] and step [scalar], live, made where there has been no step yet."""
        local = self.weights[name].local
        state = self._adamw.state[local]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(local), torch.zeros_like(local)
        return dict(state)


def decays(name: str, parameter: nn.Parameter, spec: DecoderSpec) -> bool:
    """Matrices of the blocks and an untied head; not norms, biases and embeddings, nor a head that is one."""
    is_embedding = name.startswith("embed_") or (name == "lm_head.weight" and spec.tie_word_embeddings)
    return parameter.ndim >= 2 and not is_embedding


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
