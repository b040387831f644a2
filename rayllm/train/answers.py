"""What a model that is built for training says of the answers of a preference data set.

The same forward pass as in training, whatever the layout, so that at the first step policy and reference are one. Keeps
no gradient. Letters: T tokens of a micro-batch, D hidden.
"""

import numpy as np
import torch
from torch import Tensor

from rayllm.train.batch import MicroBatch
from rayllm.train.data.cursor import deal
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.reference import Reference
from rayllm.train.head import Head
from rayllm.train.losses.pairs import pair_logps
from rayllm.train.mesh import TrainMesh
from rayllm.train.probe import probe
from rayllm.train.trainee import Trainee


def answer_logps(trainee: Trainee, mesh: TrainMesh, dataset: PackedDataset, rows: int) -> Reference:
    """On every rank; the same on all of them. `rows`: pairs that a rank takes at a time."""
    dealt = deal(np.arange(len(dataset)), micro_batch_size=rows, rank=mesh.data_rank, num_ranks=mesh.layout.data)
    sums = torch.zeros(2, len(dataset), dtype=torch.float64, device=mesh.device)

    def look(batch: MicroBatch, hidden_TD: Tensor, head: Head) -> None:
        found = pair_logps(head.log_probs(hidden_TD, batch.targets_T).detach(), batch)
        samples = list(batch.sample_ids)
        sums[0, samples], sums[1, samples] = found.chosen_P.double(), found.rejected_P.double()

    probe(trainee, mesh, (dataset.micro_batch(samples.tolist()) for samples in dealt), look)
    chosen, rejected = mesh.sum(sums, "shard", "replicate", "pipeline").cpu().numpy()
    return Reference(chosen=chosen, rejected=rejected)
