"""A model that is built for training, asked and not taught: the same forward pass, whatever the layout."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rayllm.train.batch import MicroBatch
from rayllm.train.head import Head
from rayllm.train.mesh import TrainMesh
from rayllm.train.objective import Loss
from rayllm.train.trainee import Trainee

# Is shown a micro-batch, the hidden states [T, D] of all its tokens, and the head behind them.
Look = Callable[[MicroBatch, Tensor, Head], None]


def probe(trainee: Trainee, mesh: TrainMesh, batches: Iterable[MicroBatch], look: Look) -> None:
    """On every rank, each with its own micro-batches, equally many; `look` is called on the last stage alone. What it
    keeps it has to detach."""
    objective, trainee.objective = trainee.objective, _Shown(look)
    try:
        # With gradients, though none is taken: kernels choose by that how they compute, and in bfloat16 a step would
        # find another model than the one that was asked. (DTensor, too, gives kernels what they cannot read without.)
        with torch.enable_grad():
            for batch in batches:
                _forward(trainee, mesh, batch.to(mesh.device))
    finally:
        trainee.objective = objective
        for module in trainee.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a backward pass would have; what is whole now would not see weights change


class _Shown:
    """In the place of an objective."""

    measures = ()

    def __init__(self, look: Look) -> None:
        self._look = look

    def count(self, batch: MicroBatch) -> int:
        return 0

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Loss:
        self._look(batch, hidden_TD, head)
        return Loss(total=hidden_TD.new_zeros(()), measures_K=hidden_TD.new_zeros(0))


def _forward(trainee: Trainee, mesh: TrainMesh, batch: MicroBatch) -> None:
    """Through all stages, one after another: nothing comes back, so nothing is worth a schedule."""
    trainee.begin([batch], 1)
    group = mesh.group("pipeline")
    x = batch.token_ids
    if not mesh.stage.is_first_stage:
        size = (batch.token_ids.numel(), trainee.decoder.spec.hidden_size)
        x = torch.empty(size, dtype=trainee.dtype, device=mesh.device)
        dist.recv(x, group=group, group_src=mesh.pp_rank - 1)
    x = trainee(x, torch.tensor(0))
    if not mesh.stage.is_last_stage:
        dist.send(x.detach(), group=group, group_dst=mesh.pp_rank + 1)
