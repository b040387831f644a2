"""What an executor and its shards say to each other, as msgpack.

shard  -> executor   Ready(num_blocks)       once loaded: how many KV blocks fit; from every rank
executor -> shards   InitCache(num_blocks)   the least of them, so that a block id means the same on every rank
shard  -> executor   Ready(num_blocks)       the cache is there; from every rank
executor -> shards   Execute(batch)          for each step
shard  -> executor   StepResult              from the sampling rank alone
"""

import msgspec

from rayllm.scheduler.batch import Batch


class InitCache(msgspec.Struct, frozen=True, array_like=True, tag="init_cache"):
    num_blocks: int


class Execute(msgspec.Struct, frozen=True, array_like=True, tag="execute"):
    batch: Batch


Command = InitCache | Execute


class Ready(msgspec.Struct, frozen=True, array_like=True):
    num_blocks: int
