"""What one rank does in the tests of training; imports no transformers, so that ranks start fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayllm.models.checkpoint import Checkpoint
from rayllm.train import ppo
from rayllm.train.batch import MicroBatch
from rayllm.train.checkpoint import Checkpointer
from rayllm.train.config import (
    NO_ADAPTERS,
    CheckpointConfig,
    LayoutConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from rayllm.train.initial import stored_weights, with_adapters
from rayllm.train.mesh import TrainMesh
from rayllm.train.objective import NextToken
from rayllm.train.recipes import RECIPES
from rayllm.train.rollout import Answer, Rollout
from rayllm.train.saved import SavedRun, TrainState
from rayllm.train.step import StepReport, TrainStep
from rayllm.train.trainee import build_trainee
from rayllm.train.trainer import train as train_run

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trained:
    reports: list[StepReport]
    weights: dict[str, Tensor]  # whole; in a pipeline those of the rank's stage


def make_step(
    directory: Path,
    layout: LayoutConfig,
    optimizer: OptimizerConfig,
    lora: LoraConfig = NO_ADAPTERS,
    **model: Any,
) -> TrainStep:
    mesh, checkpoint = TrainMesh(layout, CPU), Checkpoint.open(directory)
    config = ModelConfig(start=str(directory), **model)
    objective, weights = NextToken(), stored_weights(checkpoint)
    if lora.rank:
        weights = with_adapters(weights, config.seed)
    trainee = build_trainee(checkpoint.spec, weights, objective, mesh, config, lora=lora)
    return TrainStep(trainee, objective, mesh, optimizer)


def train(
    directory: Path,
    layout: LayoutConfig,
    optimizer: OptimizerConfig,
    steps: list[list[MicroBatch]],
    model: dict[str, Any],
) -> Trained:
    """`steps`: of each step the micro-batches of all ranks, those of data rank 0 first."""
    step = make_step(directory, layout, optimizer, **model)
    reports = []
    for batches in steps:
        share = len(batches) // layout.data
        first = step.mesh.data_rank * share
        reports.append(step(batches[first : first + share], 1.0))
    return Trained(reports, {name: whole(one) for name, one in step.trainee.decoder.named_parameters()})


def whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def train_with_checkpoint(
    directory: Path,
    run: Path,
    layout: LayoutConfig,
    optimizer: OptimizerConfig,
    steps: list[list[MicroBatch]],
    saved_after: int,
    model: dict[str, Any],
) -> Trained:
    """Goes on from the last checkpoint, else from the start; `saved_after` that many steps a checkpoint is written
    while training goes on."""
    step = make_step(directory, layout, optimizer, **model)
    checkpointer = Checkpointer(run, directory, step, step.mesh, CheckpointConfig(), "float32")
    saved = SavedRun(run).latest()
    first = 0
    if saved is not None:
        state = checkpointer.restore(saved)
        assert state.cursor == {"sample": state.step}
        first = state.step
    reports = []
    for number, batches in enumerate(steps[first:], first + 1):
        share = len(batches) // layout.data
        mine = step.mesh.data_rank * share
        reports.append(step(batches[mine : mine + share], 1.0))
        if number == saved_after:
            checkpointer.save(TrainState(step=number, loss=reports[-1].loss, cursor={"sample": number}))
    checkpointer.close()
    return Trained(reports, {name: whole(one) for name, one in step.trainee.decoder.named_parameters()})


def run_recipe(recipe: str, config: TrainConfig) -> None:
    """A whole run, as a worker of Ray goes through it."""
    train_run(config, RECIPES[recipe], CPU)


def run_ppo(config: TrainConfig) -> list[list[Answer]]:
    """A whole run; -> the answers of its rollouts."""
    rollouts: list[list[Answer]] = []

    class Recorded(Rollout):
        def __call__(self, *arguments: Any) -> list[Answer]:
            rollouts.append(super().__call__(*arguments))
            return rollouts[-1]

    with mock.patch.object(ppo, "Rollout", Recorded):
        train_run(config, RECIPES["ppo"], CPU)
    return rollouts
