"""What is minimised, as the step sees it, and the objective of pretraining and of supervised tuning.

An objective is a sum over things that count (tokens, pairs), and says how many there are. By what the sum is divided,
the number of all ranks and all micro-batches of the step, only the step knows; a mean of means would weigh a token by
how many others happened to lie beside it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rayllm.train.batch import MicroBatch
from rayllm.train.head import Head


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Sums over the same things: `total`, a scalar of float32 or wider with a gradient, and `measures_K` without one,
    float64, in the order of `Objective.measures`."""

    total: Tensor
    measures_K: Tensor


class Objective(Protocol):
    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what is told of each step beside the loss, as means over what the loss is a mean over."""

    def count(self, batch: MicroBatch) -> int:
        """How many things of `batch` the loss is a sum over. Needs no model."""

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Loss:
        """`hidden_TD`: what `Decoder.forward` gives for all tokens."""


class NextToken:
    """Cross-entropy of every target (pretraining; supervised tuning, where the mask leaves the answers)."""

    measures = ()

    def count(self, batch: MicroBatch) -> int:
        return batch.num_targets

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Loss:
        total = head.cross_entropy(hidden_TD, batch.targets_T)
        return Loss(total=total, measures_K=torch.zeros(0, dtype=torch.float64, device=total.device))
