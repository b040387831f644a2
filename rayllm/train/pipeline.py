"""Pipeline parallel for training: micro-batches through the stages, one forward and one backward in turn (1F1B,
Narayanan et al. 2019), by torch.distributed.pipelining. Letters: M micro-batches, B rows, S tokens of a row, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from rayllm.core.errors import DataError
from rayllm.train.batch import MicroBatch
from rayllm.train.mesh import TrainMesh
from rayllm.train.trainee import Trainee


class Pipeline:
    """For a fixed number of micro-batches of one shape, as packed rows are: what travels between stages is allocated
    once."""

    def __init__(self, trainee: Trainee, mesh: TrainMesh, num_batches: int, shape: torch.Size) -> None:
        """`shape`: [B, S] of every micro-batch."""
        self._shape = (num_batches, *shape)
        self._is_first, self._is_last = mesh.stage.is_first_stage, mesh.stage.is_last_stage
        rows, length = shape
        hidden = torch.empty(rows * length, trainee.decoder.spec.hidden_size, dtype=trainee.dtype, device="meta")
        ids = torch.empty(1, rows, length, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=torch.float32, device="meta")
        stage = PipelineStage(
            trainee,
            mesh.pp_rank,
            mesh.layout.pipeline,
            mesh.device,
            input_args=ids if self._is_first else hidden.requires_grad_(),
            output_args=loss.requires_grad_() if self._is_last else hidden.requires_grad_(),
            group=mesh.group("pipeline"),
        )
        # The last stage's output is its part of the loss already, divided as it has to be.
        self._schedule = Schedule1F1B(stage, num_batches, loss_fn=_identity, scale_grads=False)
        self._device = mesh.device

    def __call__(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Forward and backward of all; -> the sum of the losses on the last stage, 0 on the others.

        Raises DataError where a micro-batch has another shape than those before.
        """
        for batch in batches:
            if (len(batches), *batch.token_ids.shape) != self._shape:
                raise DataError(
                    f"pipeline stages need micro-batches of one shape: {list(self._shape[1:])} before,"
                    f" now {list(batch.token_ids.shape)}; pack the rows or pad them to one length"
                )
        ids_MBS = [torch.stack([batch.token_ids for batch in batches])] if self._is_first else []
        order_M = torch.arange(len(batches))
        losses: list[Tensor] = []
        if self._is_last:
            self._schedule.step(*ids_MBS, index=order_M, target=order_M, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*ids_MBS, index=order_M, return_outputs=False)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for loss in losses:
            total += loss.detach()
        return total


def _identity(loss: Tensor, target: Tensor) -> Tensor:
    return loss
