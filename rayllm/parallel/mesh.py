"""Which part of a model this process holds, and the groups it talks to.

Rank = pp_rank * tp_size + tp_rank: the ranks of one stage, which talk most, are neighbours.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from rayllm.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """A group is None where its axis has size 1, and nothing is ever sent along that axis."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    tp_group: ProcessGroup | None = None
    pp_group: ProcessGroup | None = None

    @classmethod
    def single(cls) -> "Mesh":
        return cls()

    @classmethod
    def from_world(cls, tp: int, pp: int) -> "Mesh":
        """After `init_process_group`, called by every rank of the world with the same sizes."""
        world = dist.get_world_size()
        if world != tp * pp:
            raise ConfigError(f"tensor {tp} x pipeline {pp} needs {tp * pp} processes, the world has {world}")
        pp_rank, tp_rank = divmod(dist.get_rank(), tp)
        tp_group = pp_group = None
        # Every rank takes part in making every group, its own or not.
        if tp > 1:
            tp_group = [dist.new_group([stage * tp + one for one in range(tp)]) for stage in range(pp)][pp_rank]
        if pp > 1:
            pp_group = [dist.new_group([stage * tp + one for stage in range(pp)]) for one in range(tp)][tp_rank]
        return cls(tp_rank=tp_rank, tp_size=tp, pp_rank=pp_rank, pp_size=pp, tp_group=tp_group, pp_group=pp_group)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def prev_rank(self) -> int:
        """Global rank with the same tensor slice in the stage before."""
        assert not self.is_first_stage
        return (self.pp_rank - 1) * self.tp_size + self.tp_rank

    @property
    def next_rank(self) -> int:
        """Global rank with the same tensor slice in the stage after."""
        assert not self.is_last_stage
        return (self.pp_rank + 1) * self.tp_size + self.tp_rank
