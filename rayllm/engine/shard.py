"""A rank as a shard of a group: commands in, step results out. Knows nothing of Ray."""

import msgspec

from rayllm.engine.build import ShardConfig, load_runner
from rayllm.engine.commands import Command, InitCache, Ready
from rayllm.engine.model_runner import ModelRunner
from rayllm.models.checkpoint import Checkpoint
from rayllm.parallel.mesh import Mesh

_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(Command).decode


class RunnerHandler:
    """A `rayllm_cluster.shard.Handler`; `rayllm.engine.commands` has the protocol."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def ready(self) -> bytes:
        return _encode(Ready(self._runner.num_blocks_that_fit))

    def handle(self, payload: bytes) -> bytes | None:
        command = _decode_command(payload)
        if isinstance(command, InitCache):
            self._runner.init_cache(command.num_blocks)
            return _encode(Ready(command.num_blocks))
        result = self._runner.execute(command.batch)
        return None if result is None else _encode(result)


def create_handler(rank: int, world_size: int, config: bytes) -> RunnerHandler:
    """A `rayllm_cluster.shard.HandlerFactory`. torch.distributed is up where there are several ranks."""
    shard = msgspec.msgpack.decode(config, type=ShardConfig)
    parallel = shard.engine.parallel
    mesh = Mesh.single() if world_size == 1 else Mesh.from_world(parallel.tensor, parallel.pipeline)
    return RunnerHandler(load_runner(Checkpoint.open(shard.directory), shard, mesh))
