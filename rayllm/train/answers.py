"""What a model that is built for training says of the answers of a preference data set.

The same forward pass as in training, whatever the layout, so that at the first step policy and reference are one. Keeps
no gradient. Letters: T tokens of a micro-batch, D hidden.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rayllm.train.batch import MicroBatch
from rayllm.train.data.cursor import deal
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.reference import Reference
from rayllm.train.head import Head
from rayllm.train.losses.pairs import PairLogps, num_pairs, pair_logps
from rayllm.train.mesh import TrainMesh
from rayllm.train.objective import Loss
from rayllm.train.trainee import Trainee


def answer_logps(trainee: Trainee, mesh: TrainMesh, dataset: PackedDataset, rows: int) -> Reference:
    """On every rank; the same on all of them. `rows`: pairs that a rank takes at a time."""
    batches = deal(np.arange(len(dataset)), micro_batch_size=rows, rank=mesh.data_rank, num_ranks=mesh.layout.data)
    sums = torch.zeros(2, len(dataset), dtype=torch.float64, device=mesh.device)
    objective, trainee.objective = trainee.objective, (answers := _Answers())
    try:
        for samples in batches:
            # Without gradients DTensor gives blocks tensors that are still on their way, which kernels cannot read.
            with torch.set_grad_enabled(mesh.layout.tensor > 1):
                _forward(trainee, mesh, dataset.micro_batch(samples.tolist()).to(mesh.device))
            if mesh.stage.is_last_stage:
                sums[0, samples], sums[1, samples] = answers.found.chosen_P.double(), answers.found.rejected_P.double()
    finally:
        trainee.objective = objective
        for module in trainee.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a backward pass would have; what is whole now would not see weights change
    chosen, rejected = mesh.sum(sums, "shard", "replicate", "pipeline").cpu().numpy()
    return Reference(chosen=chosen, rejected=rejected)


class _Answers:
    """In the place of an objective: keeps what it is shown."""

    measures = ()
    found: PairLogps

    def count(self, batch: MicroBatch) -> int:
        return num_pairs(batch)

    def loss(self, hidden_TD: Tensor, head: Head, batch: MicroBatch) -> Loss:
        self.found = pair_logps(head.log_probs(hidden_TD, batch.targets_T).detach(), batch)
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
