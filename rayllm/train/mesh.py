"""The ranks of a training run along four axes, and sums over them.

Rank = ((pipeline * R + replicate) * S + shard) * T + tensor: the ranks of one tensor group, which talk most, are
neighbours, as in serving.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rayllm.core.errors import ConfigError
from rayllm.parallel.mesh import Mesh
from rayllm.train.config import LayoutConfig

AXES = ("pipeline", "replicate", "shard", "tensor")


class TrainMesh:
    """`device`: where this rank's part of the model lies."""

    def __init__(self, layout: LayoutConfig, device: torch.device) -> None:
        """After `init_process_group`, called by every rank of the world with the same layout."""
        if dist.get_world_size() != layout.world:
            raise ConfigError(f"the layout needs {layout.world} workers, there are {dist.get_world_size()}")
        self.layout = layout
        self.device = device
        shape = (layout.pipeline, layout.replicate, layout.shard, layout.tensor)
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
        coordinates = self._mesh.get_coordinate()
        assert coordinates is not None
        self.pp_rank, replica, shard, self.tp_rank = coordinates
        self.data_rank = replica * layout.shard + shard
        self.ends_group = self._make_ends_group()

    @property
    def tensor(self) -> DeviceMesh:
        return self._mesh["tensor"]

    @property
    def data(self) -> DeviceMesh:
        """What FSDP2 takes: one axis that shards, or one that replicates and one that shards."""
        return self._mesh["replicate", "shard"] if self.layout.replicate > 1 else self._mesh["shard"]

    @property
    def stage(self) -> Mesh:
        """As the plan of pipeline stages takes it."""
        return Mesh(pp_rank=self.pp_rank, pp_size=self.layout.pipeline)

    def group(self, axis: str) -> ProcessGroup:
        return self._mesh.get_group(axis)

    def sum(self, values: Tensor, *axes: str) -> Tensor:
        """`values`, which becomes its sum over the ranks along `axes`: the same bits on all of them."""
        for axis in axes:
            if self._mesh[axis].size() > 1:
                dist.all_reduce(values, group=self.group(axis))
        return values

    def _make_ends_group(self) -> ProcessGroup | None:
        """This rank's first and last stage, of which both hold a tied embedding; None between them."""
        mine = None
        if self.layout.pipeline > 1:
            # Every rank takes part in making every group, its own or not.
            for first, last in zip(self._mesh.mesh[0].flatten(), self._mesh.mesh[-1].flatten(), strict=True):
                ranks = [int(first), int(last)]
                group = dist.new_group(ranks)
                mine = group if dist.get_rank() in ranks else mine
        return mine
