"""What an executor and its shards say to each other, as msgpack.

shard  -> executor   Ready(num_blocks)       once loaded: how many KV blocks fit; from every rank
executor -> shards   InitCache(num_blocks)   the least of them, so that a block id means the same on every rank
shard  -> executor   Ready(num_blocks)       the cache is there; from every rank
executor -> shards   Execute(batch)          for each step
shard  -> executor   StepResult              from the sampling rank alone
executor -> shards   Load(weights)           begin to read other weights, beside the steps
executor -> shards   Look()                  between steps
shard  -> executor   LoadState               how far the load is; from every rank
executor -> shards   Drop(version)           of weights that no batch will name any more

Commands are carried out in the order in which they were sent, and answered in that order.
"""

import msgspec

from rayllm.engine.weights import Weights
from rayllm.scheduler.batch import Batch, StepResult


class InitCache(msgspec.Struct, frozen=True, array_like=True, tag="init_cache"):
    num_blocks: int


class Execute(msgspec.Struct, frozen=True, array_like=True, tag="execute"):
    batch: Batch


class Load(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    weights: Weights


class Look(msgspec.Struct, frozen=True, array_like=True, tag="look"):
    pass


class Drop(msgspec.Struct, frozen=True, array_like=True, tag="drop"):
    weight_version: str


Command = InitCache | Execute | Load | Look | Drop


class Ready(msgspec.Struct, frozen=True, array_like=True):
    num_blocks: int


class LoadState(msgspec.Struct, frozen=True, array_like=True, tag="load_state"):
    """`problem`: the path and the problem of a CheckpointError."""

    is_done: bool
    problem: tuple[str, str] | None = None


Answer = StepResult | LoadState
