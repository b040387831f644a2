"""What a loss asks of the last projection: log-probabilities, whether one rank holds the vocabulary or several hold
parts of it, or a single number: the score of a reward model, the value that a policy expects.

Logits are made some rows at a time, of tokens with a target only, and never kept. Letters: T tokens, N of them with a
target, D hidden, V vocabulary (of this rank), C tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rayllm.train.batch import IGNORE
from rayllm_kernels import fused_linear_cross_entropy

_CHUNK_LOGITS = 1 << 26


@dataclass(frozen=True, slots=True)
class Head:
    """`weight_VD`: this rank's part of the vocabulary, in the order of ranks; `group`: the others, None alone.
    `value_1D`: of a head beside it, whole on every rank."""

    weight_VD: Tensor
    group: ProcessGroup | None
    value_1D: Tensor | None = None

    def cross_entropy(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """-> the sum of the targets' negative log-probabilities, float32. The same on every rank of the group."""
        if self.group is None:
            rows_N = _rows_with_target(targets_T)
            return fused_linear_cross_entropy(hidden_TD[rows_N], self.weight_VD, targets_T[rows_N], IGNORE)
        return -self.log_probs(hidden_TD, targets_T).sum()

    def scores(self, hidden_ND: Tensor) -> Tensor:
        """-> [N] float32 or wider, of a head of one row, which is whole on every rank."""
        return _numbers(hidden_ND, self.weight_VD)

    def values(self, hidden_TD: Tensor) -> Tensor:
        """-> [T] float32 or wider, of the head beside the vocabulary's."""
        assert self.value_1D is not None
        return _numbers(hidden_TD, self.value_1D)

    def log_probs(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """-> [T] float32, each target's log-probability; 0 where it is `IGNORE`. The same on every rank of the group.

        Logits are computed once more in the backward pass.
        """
        rows_N = _rows_with_target(targets_T)
        log_probs_N: Tensor = _LogProbs.apply(hidden_TD[rows_N], self.weight_VD, targets_T[rows_N], self.group)  # type: ignore[no-untyped-call]
        return log_probs_N.new_zeros(len(targets_T)).index_copy(0, rows_N, log_probs_N)


class _LogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] where each rank holds some columns (Shoeybi et al. 2019, section 3)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: ProcessGroup | None) -> Tensor:
        log_probs, log_sums = [], []
        local = _local_targets(targets, weight, group)
        for chunk in _chunks(hidden, weight):
            logits_CV = _logits(hidden[chunk], weight)
            largest_C = logits_CV.amax(-1)
            if group is not None:
                dist.all_reduce(largest_C, dist.ReduceOp.MAX, group=group)
            here_C = local[chunk] >= 0
            target_C = logits_CV.gather(1, local[chunk].clamp(min=0)[:, None])[:, 0]
            sums_2C = torch.stack([(logits_CV - largest_C[:, None]).exp_().sum(-1), target_C * here_C])
            if group is not None:
                dist.all_reduce(sums_2C, group=group)
            log_sums.append(largest_C + sums_2C[0].log())
            log_probs.append(sums_2C[1] - log_sums[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_sums))
        ctx.group = group
        return torch.cat(log_probs).masked_fill_(targets == IGNORE, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        upstream = gradients[0].masked_fill(targets == IGNORE, 0)
        local = _local_targets(targets, weight, ctx.group)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=log_sums.dtype) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(hidden, weight):
            dlogits_CV = (_logits(hidden[chunk], weight) - log_sums[chunk, None]).exp_().mul_(-upstream[chunk, None])
            here_C1 = (local[chunk] >= 0)[:, None]
            dlogits_CV.scatter_add_(1, local[chunk].clamp(min=0)[:, None], upstream[chunk, None] * here_C1)
            dlogits_CV = dlogits_CV.to(hidden.dtype)
            dhidden[chunk] = dlogits_CV @ weight
            if dweight is not None:
                dweight += dlogits_CV.T @ hidden[chunk]
        if ctx.group is not None:
            dist.all_reduce(dhidden, group=ctx.group)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None


def _rows_with_target(targets_T: Tensor) -> Tensor:
    """Of a conversation half of the rows have none, and the vocabulary's product is a good part of a step. One row at
    least: what has nothing to learn from has a gradient all the same, zero."""
    rows_N = (targets_T != IGNORE).nonzero()[:, 0]
    return rows_N if len(rows_N) else rows_N.new_zeros(1)


def _numbers(hidden_TD: Tensor, weight_1D: Tensor) -> Tensor:
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    return hidden_TD.to(wide) @ weight_1D[0].to(wide)


def _chunks(hidden_TD: Tensor, weight_VD: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_LOGITS // weight_VD.shape[0])
    return [slice(first, first + rows) for first in range(0, hidden_TD.shape[0], rows)]


def _logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    return (hidden_CD @ weight_VD.T).to(torch.promote_types(hidden_CD.dtype, torch.float32))


def _local_targets(targets_T: Tensor, weight_VD: Tensor, group: ProcessGroup | None) -> Tensor:
    """Counted from this rank's first token; negative where another rank has it, or nobody."""
    size = weight_VD.shape[0]
    first = 0 if group is None else dist.get_rank(group) * size
    mine_T = (targets_T >= first) & (targets_T < first + size)
    return (targets_T - first).masked_fill(~mine_T, -1)
