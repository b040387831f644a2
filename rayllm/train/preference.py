"""Learning from preference pairs: DPO and its kin as an objective of the one step.

The start model is the reference. What it says of the answers is computed once, before the first step, and travels with
each micro-batch; see `rayllm.train.answers`. Letters: T tokens, D hidden, P pairs, K measures.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rayllm.core.errors import ConfigError
from rayllm.train.answers import answer_logps
from rayllm.train.batch import MicroBatch
from rayllm.train.config import DpoConfig, TrainConfig
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.reference import (
    REFERENCE,
    Reference,
    ReferenceKey,
    read_reference,
    refuse_other,
    write_reference,
)
from rayllm.train.feed import Feed, Setup, first_epoch, packed_feed
from rayllm.train.head import Head
from rayllm.train.losses.dpo import DpoLoss, DpoVariant
from rayllm.train.losses.pairs import num_pairs, pair_logps, reference_logps
from rayllm.train.mesh import AXES
from rayllm.train.objective import Loss
from rayllm.train.saved import SavedRun


class Preference:
    """The loss of pairs. Measures: of the rewards that the policy implicitly pays, the chosen answer's, the rejected
    one's and their difference; and the share of pairs where that is above 0."""

    measures = ("margin", "accuracy", "chosen_reward", "rejected_reward")

    def __init__(self, dpo: DpoLoss) -> None:
        self._dpo = dpo

    def count(self, batch: MicroBatch) -> int:
        return num_pairs(batch)

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Loss:
        policy = pair_logps(head.log_probs(hidden_TD, batch.targets_T), batch)
        reference = None
        if self._dpo.needs_reference:
            reference = reference_logps(batch.document_values[REFERENCE], policy, batch)
        pairs = self._dpo(policy, reference)
        rewards = (pairs.chosen_rewards_P, pairs.rejected_rewards_P)
        measures = torch.stack([pairs.margins_P, pairs.correct_P.to(pairs.margins_P.dtype), *rewards])
        return Loss(total=pairs.losses_P.sum(), measures_K=measures.double().sum(1))


def dpo_loss(config: DpoConfig) -> DpoLoss:
    """Raises ConfigError for settings that do not go together."""
    try:
        return DpoLoss(
            variant=DpoVariant(config.loss),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            gamma=config.gamma,
        )
    except ConfigError as error:
        raise ConfigError(f"dpo.{error}") from None


def check_pairs(config: TrainConfig, directory: Path, dataset: PackedDataset) -> None:
    """ConfigError for what cannot be learnt so; DataError where a run would go on with another reference than it had.

    `directory`: of the start model.
    """
    loss = dpo_loss(config.dpo)
    if config.model.random:
        raise ConfigError("model.random: preferences are between answers of a model that can answer; start from one")
    if loss.needs_reference and SavedRun(Path(config.run)).latest() is not None:
        refuse_other(_folder(config), ReferenceKey.of(directory, dataset, config.model.compute_dtype))


def pair_feed(setup: Setup) -> Feed:
    """Pairs, in one shape for all micro-batches where pipeline stages need it."""
    return packed_feed(setup, _shape(setup))


def preference_feed(setup: Setup) -> Feed:
    """Pairs, with what the reference says of them."""
    shape = _shape(setup)
    if not dpo_loss(setup.config.dpo).needs_reference:
        return packed_feed(setup, shape)
    reference = _reference(setup, shape)
    return packed_feed(setup, lambda batch: reference.attach(shape(batch)))


def _shape(setup: Setup) -> Callable[[MicroBatch], MicroBatch]:
    batch = setup.config.batch
    if setup.mesh.layout.pipeline == 1:
        return lambda pairs: pairs
    length = batch.rows * setup.dataset.longest_pair()
    return lambda pairs: pairs.padded(length, batch.sequence_length)


def _folder(config: TrainConfig) -> Path:
    return Path(config.run) / "reference"


def _reference(setup: Setup, shape: Callable[[MicroBatch], MicroBatch]) -> Reference:
    """What is stored, if every rank sees it there; else computed and stored.

    Computed in the micro-batches of the run's own first epoch: in bfloat16 what is said of a pair depends on what lies
    beside it, by tenths of a nat, and policy and reference are to be one at the first step.
    """
    folder, dataset, mesh = _folder(setup.config), setup.dataset, setup.mesh
    key = ReferenceKey.of(setup.directory, dataset, setup.config.model.compute_dtype)
    found = read_reference(folder, key, len(dataset))
    seen = mesh.sum(torch.tensor(int(found is not None), device=mesh.device), *AXES)
    if found is not None and int(seen) == dist.get_world_size():
        return found
    reference = answer_logps(setup.trainee, mesh, map(shape, first_epoch(setup)), len(dataset))
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_reference(folder, key, reference)
    return reference
