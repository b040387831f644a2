"""The gradients of one step over all ranks: those of a tied embedding put together, their norm, and clipping by it."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate

from rayllm.models.spec import DecoderSpec
from rayllm.train.mesh import TrainMesh
from rayllm.train.optimizer import ShardedAdamW

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def add_tied_gradients(optimizer: ShardedAdamW, spec: DecoderSpec, mesh: TrainMesh) -> None:
    """First and last stage each hold a tied embedding, and each has a part of its gradient; both get the sum."""
    if spec.tie_word_embeddings and mesh.ends_group is not None:
        held = optimizer.weights.get(EMBEDDING) or optimizer.weights.get(HEAD)
        if held is None:  # frozen
            return
        assert held.local.grad is not None
        dist.all_reduce(held.local.grad, group=mesh.ends_group)


def grad_norm(optimizer: ShardedAdamW, spec: DecoderSpec, mesh: TrainMesh) -> float:
    """Of the whole model, each weight once: a part that several ranks hold counts as much on each of them less."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    holders = mesh.layout.data * mesh.layout.tensor
    for name, weight in optimizer.weights.items():
        copy = name == HEAD and spec.tie_word_embeddings  # counted on the first stage
        if weight.local.grad is not None and not copy:
            norm = torch.linalg.vector_norm(weight.local.grad).double()
            total += norm**2 * parts(weight.parameter) / holders
    return float(mesh.sum(total, "tensor", "shard", "replicate", "pipeline").sqrt())


def parts(parameter: nn.Parameter) -> int:
    """Into how many a parameter is split over the ranks of its stage."""
    count = 1
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if not isinstance(placement, Replicate):
                count *= parameter.device_mesh.size(axis)
    return count
