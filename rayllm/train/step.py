"""One optimizer step, the same for every recipe and every layout.

loss = the sum over all micro-batches of all ranks / how many things that sum is over. Forward and backward of each
micro-batch, the sum of gradients over the ranks, their norm, clipping, AdamW. Letters: M micro-batches of a rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rayllm.core.errors import DataError, DivergedError
from rayllm.models.spec import DecoderSpec
from rayllm.train.batch import MicroBatch
from rayllm.train.config import OptimizerConfig
from rayllm.train.flops import adapter_weights, attended_pairs, training_flops
from rayllm.train.gradients import add_tied_gradients, grad_norm
from rayllm.train.mesh import TrainMesh
from rayllm.train.objective import Objective
from rayllm.train.optimizer import ShardedAdamW
from rayllm.train.pipeline import Pipeline
from rayllm.train.trainee import Heads, Trainee


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """The same on every rank. `count`: by what the loss and the measures were divided; `tokens`: all of the step,
    padding too; `flops`: what they take by the model's shape; `grad_norm`: before clipping."""

    loss: float
    measures: Mapping[str, float]
    count: int
    tokens: int
    flops: int
    grad_norm: float
    learning_rate: float


class TrainStep:
    def __init__(
        self,
        trainee: Trainee,
        objective: Objective,
        mesh: TrainMesh,
        config: OptimizerConfig,
    ) -> None:
        self.trainee, self.mesh = trainee, mesh
        self._objective = objective
        self._spec: DecoderSpec = trainee.decoder.spec
        self._max_grad_norm = config.max_grad_norm
        self._pipeline: Pipeline | None = None
        learnt = {name: one for name, one in trainee.decoder.named_parameters() if one.requires_grad}
        self.optimizer = ShardedAdamW(learnt, self._spec, config)

    def __call__(self, batches: Sequence[MicroBatch], rate_share: float) -> StepReport:
        """`batches`: this rank's micro-batches, as many as every other rank has; ranks that share their data (of one
        tensor group, of all stages) get the same. `rate_share`: the learning rate as a share of its peak.

        Raises DataError where no rank has anything to learn from, DivergedError where the loss or a gradient is not
        finite; the weights are then what they were before.
        """
        batches = [batch.to(self.mesh.device) for batch in batches]
        documents = chain.from_iterable(batch.attended for batch in batches)
        count, tokens, pairs, predictions = self._totals(
            sum(map(self._objective.count, batches)),
            sum(batch.token_ids.numel() for batch in batches),
            attended_pairs(self._spec, documents),
            sum(batch.num_targets for batch in batches),
        )
        if count == 0:
            raise DataError("nothing to learn from in a whole step: the loss mask of every sample is empty")
        self.trainee.begin(batches, count)
        loss, measures = self._total_loss(self._pass(batches), count)
        with torch.no_grad():
            gradients = self.optimizer.collect()
            add_tied_gradients(self.optimizer, self._spec, self.mesh)
            norm = grad_norm(self.optimizer, self._spec, self.mesh)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise DivergedError(f"the loss is {loss} and the norm of its gradient {norm}: training has diverged")
            if self._max_grad_norm and norm > self._max_grad_norm:
                torch._foreach_mul_(gradients, self._max_grad_norm / (norm + 1e-6))  # as clip_grad_norm_ of torch does
            rate = self.optimizer.step(rate_share)
        return StepReport(
            loss=loss,
            measures=measures,
            count=count,
            tokens=tokens,
            flops=training_flops(
                self._spec,
                tokens,
                pairs,
                predictions if self.trainee.heads is not Heads.SCORE else 0,
                adapters=adapter_weights(self._spec, self.trainee.lora),
            ),
            grad_norm=norm,
            learning_rate=rate,
        )

    def _pass(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Forward and backward of all micro-batches; -> this rank's part of the loss, 0 before the last stage."""
        if self.mesh.layout.pipeline > 1:
            if self._pipeline is None:
                self._pipeline = Pipeline(self.trainee, self.mesh, len(batches), batches[0].token_ids.shape)
            return self._pipeline(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for number, batch in enumerate(batches):
            if isinstance(self.trainee, FSDPModule):
                # A part of the gradient is all that is kept between micro-batches; groups are summed over once.
                self.trainee.set_requires_all_reduce(number == len(batches) - 1)
            loss = self.trainee(batch.token_ids, torch.tensor(number))
            loss.backward()
            total += loss.detach()
        return total

    def _totals(self, *counts: int) -> list[int]:
        totals: list[int] = self.mesh.sum(torch.tensor(counts, device=self.mesh.device), "shard", "replicate").tolist()
        return totals

    def _total_loss(self, part: Tensor, count: int) -> tuple[float, dict[str, float]]:
        parts = torch.cat([part[None], self.trainee.measures_K])
        loss, *sums = self.mesh.sum(parts, "shard", "replicate", "pipeline").tolist()
        return loss, {name: one / count for name, one in zip(self._objective.measures, sums, strict=True)}
