"""The weights that training starts from, one whole parameter at a time: read from a checkpoint, or drawn.

Which rank asks, and how the model is split, makes no difference to what it gets.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rayllm.core.errors import ConfigError
from rayllm.models.checkpoint import SCORE, Checkpoint
from rayllm.models.spec import DecoderSpec
from rayllm.train.lora import is_adapter, plain_name

# A parameter of `Decoder.named_parameters()` and its whole shape -> its value, float32, the caller's to keep.
InitialWeights = Callable[[str, tuple[int, ...]], Tensor]

VALUE = "value_head.weight"  # [1, D]
_STD = 0.02


def stored_weights(checkpoint: Checkpoint) -> InitialWeights:
    """Raises ConfigError for int8 weights, which have no gradient."""
    if checkpoint.int8:
        raise ConfigError(f"{checkpoint.directory}: has int8 weights, which cannot be trained; start from what it was")

    def read(parameter: str, shape: tuple[int, ...]) -> Tensor:
        whole = checkpoint.read(parameter, tuple(slice(0, size) for size in shape))
        return whole.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    return read


def with_score(weights: InitialWeights, seed: int) -> InitialWeights:
    """`weights`, and the head of a reward model: normal with deviation 1 / sqrt(D + 1) (Stiennon et al. 2020), from the
    seed alone."""

    def weight(parameter: str, shape: tuple[int, ...]) -> Tensor:
        if parameter != SCORE:
            return weights(parameter, shape)
        return torch.empty(shape).normal_(0, 1 / math.sqrt(shape[1] + 1), generator=_generator(seed, parameter))

    return weight


def with_value(weights: InitialWeights) -> InitialWeights:
    """`weights`, and a value head that expects nothing yet: zeros."""
    return lambda parameter, shape: torch.zeros(shape) if parameter == VALUE else weights(parameter, shape)


def with_adapters(weights: InitialWeights, seed: int) -> InitialWeights:
    """`weights`, and adapters that add nothing yet: A uniform within 1 / sqrt(inputs), as peft draws it, each from
    (seed, name) alone; B zeros."""

    def weight(parameter: str, shape: tuple[int, ...]) -> Tensor:
        if not is_adapter(parameter):
            return weights(plain_name(parameter), shape)
        if ".lora_B." in parameter:
            return torch.zeros(shape)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=_generator(seed, parameter))

    return weight


def random_weights(spec: DecoderSpec, seed: int) -> InitialWeights:
    """GPT-2's (Radford et al. 2019): normal with deviation 0.02, and what is added to the residual stream scaled by
    1 / sqrt(2 * layers), since that many of them are; biases 0, norms 1. Each parameter from (seed, name) alone."""

    def draw(parameter: str, shape: tuple[int, ...]) -> Tensor:
        if spec.tie_word_embeddings and parameter == "lm_head.weight":
            parameter = "embed_tokens.weight"  # the copy of the last pipeline stage
        module, _, kind = parameter.rpartition(".")
        if kind == "bias":
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        deviation = _STD
        if module.endswith(("o_proj", "down_proj")):
            deviation /= math.sqrt(2 * spec.num_layers)
        return torch.empty(shape).normal_(0, deviation, generator=_generator(seed, parameter))

    return draw


def _generator(seed: int, parameter: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {parameter}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
