"""What a model that is built for training says of the answers of a preference data set.

The same forward pass as in training, whatever the layout, so that at the first step policy and reference are one. Keeps
no gradient. Letters: T tokens of a micro-batch, D hidden.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rayllm.train.batch import MicroBatch
from rayllm.train.data.reference import Reference
from rayllm.train.head import Head
from rayllm.train.losses.pairs import pair_logps
from rayllm.train.mesh import TrainMesh
from rayllm.train.probe import probe
from rayllm.train.trainee import Trainee


def answer_logps(trainee: Trainee, mesh: TrainMesh, batches: Iterable[MicroBatch], num_samples: int) -> Reference:
    """On every rank; the same on all of them. `batches`: this rank's, which together with the other ranks' hold each of
    the data set's samples once."""
    sums = torch.zeros(2, num_samples, dtype=torch.float64, device=mesh.device)

    def look(batch: MicroBatch, hidden_TD: Tensor, head: Head) -> None:
        found = pair_logps(head.log_probs(hidden_TD, batch.targets_T).detach(), batch)
        samples = list(batch.sample_ids)
        sums[0, samples], sums[1, samples] = found.chosen_P.double(), found.rejected_P.double()

    probe(trainee, mesh, batches, look)
    chosen, rejected = mesh.sum(sums, "shard", "replicate", "pipeline").cpu().numpy()
    return Reference(chosen=chosen, rejected=rejected)
