"""A reward model: a decoder whose head gives one number, learnt from preference pairs.

The score of a document is what the head says of its last token, the answer's end. A run's checkpoint is what
transformers loads as a sequence classifier of one label. Letters: T tokens, D hidden, N documents, P pairs, K measures.
"""

from pathlib import Path

import torch
from torch import Tensor

from rayllm.core.errors import ConfigError
from rayllm.train.batch import MicroBatch
from rayllm.train.config import TrainConfig
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.head import Head
from rayllm.train.losses.pairs import num_pairs, pair_scores
from rayllm.train.losses.reward import pairwise_loss
from rayllm.train.objective import Loss


class Reward:
    """The pairwise loss. Measures: both answers' rewards and their difference, and the share of pairs where that is
    above 0."""

    measures = ("margin", "accuracy", "chosen_reward", "rejected_reward")

    def count(self, batch: MicroBatch) -> int:
        return num_pairs(batch)

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Loss:
        last_N = torch.tensor(batch.cu_seqlens[1:], device=hidden_TD.device) - 1
        chosen_P, rejected_P = pair_scores(head.scores(hidden_TD[last_N]), batch)
        margins_P = (chosen_P - rejected_P).detach()
        correct_P = (margins_P > 0).to(margins_P.dtype)
        measures = torch.stack([margins_P, correct_P, chosen_P.detach(), rejected_P.detach()])
        return Loss(total=pairwise_loss(chosen_P, rejected_P).sum(), measures_K=measures.double().sum(1))


def check_start(config: TrainConfig, directory: Path, dataset: PackedDataset) -> None:
    """ConfigError where there is nothing to begin from."""
    if config.model.random:
        raise ConfigError("model.random: rewards are for answers that a model can read; start from one")
