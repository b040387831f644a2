"""Weights that are split over ranks, put together again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayllm.models.checkpoint import DTYPES
from rayllm.train.config import DType
from rayllm.train.gradients import HEAD
from rayllm.train.initial import VALUE
from rayllm.train.lora import acting, is_adapter, plain_name
from rayllm.train.mesh import TrainMesh
from rayllm.train.trainee import Trainee


def whole(parameter: Tensor) -> Tensor:
    """Of all ranks that hold a part of it, on each of them; to be called by all of them."""
    with _quiet():
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def language_model(trainee: Trainee, mesh: TrainMesh, dtype: DType) -> dict[str, Tensor]:
    """The whole model on every rank of the world, by its names in a decoder without adapters, whose part is added to
    the weights; without a tied head and without a value head. Copies, on the rank's device."""
    tied = trainee.decoder.spec.tie_word_embeddings
    parameters = {name: parameter.detach() for name, parameter in trainee.decoder.named_parameters()}
    mine = {
        name: parameter
        for name, parameter in parameters.items()
        if name != VALUE and not (name == HEAD and tied) and not is_adapter(name)
    }
    stages: list[dict[str, torch.Size]] = [{} for _ in range(mesh.layout.pipeline)]
    shapes = {name: parameter.shape for name, parameter in mine.items()}
    dist.all_gather_object(stages, shapes, group=mesh.group("pipeline"))
    gathered = {}
    for stage, held in enumerate(stages):
        for name, shape in held.items():
            value = torch.empty(shape, dtype=DTYPES[dtype], device=mesh.device)
            if stage == mesh.pp_rank:
                value.copy_(acting(name, parameters, trainee.lora, whole))
            if mesh.layout.pipeline > 1:
                dist.broadcast(value, group=mesh.group("pipeline"), group_src=stage)
            gathered[plain_name(name)] = value
    return gathered


@contextmanager
def _quiet() -> Iterator[None]:
    """Gathering a weight that is split twice takes two collectives, which torch finds worth a warning for each."""
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
