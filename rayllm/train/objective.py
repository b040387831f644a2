"""What is minimised, as the step sees it, and the objective of pretraining and of supervised tuning.

An objective is a sum over things that count (tokens, pairs), and says how many there are. By what the sum is divided,
the number of all ranks and all micro-batches of the step, only the step knows; a mean of means would weigh a token by
how many others happened to lie beside it.
"""

from typing import Protocol

from torch import Tensor

from rayllm.train.batch import MicroBatch
from rayllm.train.head import Head


class Objective(Protocol):
    def count(self, batch: MicroBatch) -> int:
        """How many things of `batch` the loss is a sum over. Needs no model."""

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Tensor:
        """-> the sum, a float32 scalar with a gradient. `hidden_TD`: what `Decoder.forward` gives for all tokens."""


class NextToken:
    """Cross-entropy of every target (pretraining; supervised tuning, where the mask leaves the answers)."""

    def count(self, batch: MicroBatch) -> int:
        return batch.num_targets

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Tensor:
        return head.cross_entropy(hidden_TD, batch.targets_T)
