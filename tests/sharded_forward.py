"""What one rank does in the tests of sharded models; imports no transformers, so that ranks start fast."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rayllm.core.errors import ConfigError
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.context import DenseContext
from rayllm.models.quantization import Scheme
from rayllm.parallel.fuse import fuse_projections
from rayllm.parallel.load import load_shard
from rayllm.parallel.mesh import Mesh
from rayllm.parallel.pipeline import recv_hidden, send_hidden
from rayllm.parallel.tensor import W8A8RowParallel
from rayllm.quant.int8_linear import Int8Linear

CPU = torch.device("cpu")


class CountingCheckpoint(Checkpoint):
    """Counts the weights that were read."""

    num_read = 0

    def read(self, parameter: str, index: tuple[slice, ...]) -> Tensor:
        part = super().read(parameter, index)
        self.num_read += part.numel()
        return part


@dataclass(frozen=True)
class RankReport:
    num_read: int
    num_held: int
    logits_TV: Tensor | None  # on the last stage's first tensor rank only


def forward(
    directory: Path,
    tp: int,
    pp: int,
    ids: Tensor,
    cu_seqlens: list[int],
    dtype: torch.dtype,
    fuse: bool,
    quantize: Scheme | None = None,
) -> RankReport:
    mesh, checkpoint = Mesh.from_world(tp, pp), CountingCheckpoint.open(directory)
    assert isinstance(checkpoint, CountingCheckpoint)
    model = load_shard(checkpoint, mesh, dtype=dtype, device=CPU, quantize=quantize)
    if fuse:
        fuse_projections(model)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cu_seqlens)])
    logits_TV = None
    with torch.inference_mode():
        x = ids if mesh.is_first_stage else recv_hidden(mesh, len(ids), checkpoint.spec.hidden_size, dtype, CPU)
        x = model(x, positions, DenseContext(cu_seqlens))
        if not mesh.is_last_stage:
            send_hidden(mesh, x)
        else:
            whole_or_part = model.logits(x)
            logits_TV = whole_or_part if mesh.tp_rank == 0 else None
    return RankReport(checkpoint.num_read, sum(one.numel() for one in model.parameters()), logits_TV)


@torch.inference_mode()
def w8a8_row_parallel(x_TK: Tensor, whole: Int8Linear) -> Tensor:
    """The output of `whole`, which has outlier columns and no bias, when each rank of the world holds a part of K."""
    mesh = Mesh.from_world(dist.get_world_size(), 1)
    assert mesh.tp_group is not None
    size = whole.in_features // mesh.tp_size
    first = mesh.tp_rank * size
    mine_J = (whole.outlier_columns >= first) & (whole.outlier_columns < first + size)
    linear = Int8Linear(size, whole.out_features, scheme="w8a8", bias=False, outliers=True)
    linear.set_weight(whole.weight[:, first : first + size].contiguous(), whole.weight_scale)
    linear.set_outliers(whole.outlier_columns[mine_J] - first, whole.outlier_weight, int(mine_J.nonzero()[0]))
    output: Tensor = W8A8RowParallel(linear, mesh.tp_group)(x_TK[:, first : first + size].contiguous())
    return output


def mesh_refusal(tp: int, pp: int) -> str:
    try:
        Mesh.from_world(tp, pp)
    except ConfigError as error:
        return str(error)
    return "no refusal"
