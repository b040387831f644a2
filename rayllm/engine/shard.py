"""A rank as a shard of a group: commands in, step results out. Knows nothing of Ray."""

import msgspec

from rayllm.core.errors import CheckpointError
from rayllm.core.garbage import keep_what_is_loaded
from rayllm.engine.background_load import BackgroundLoad
from rayllm.engine.build import ShardConfig, load_runner
from rayllm.engine.commands import Command, Drop, Execute, InitCache, Load, LoadState, Ready
from rayllm.engine.model_runner import ModelRunner
from rayllm.parallel.mesh import Mesh

_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(Command).decode


class RunnerHandler:
    """A `rayllm_cluster.shard.Handler`; `rayllm.engine.commands` has the protocol."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._loading: BackgroundLoad | None = None
        self._load_state = LoadState(is_done=True)

    def ready(self) -> bytes:
        return _encode(Ready(self._runner.num_blocks_that_fit))

    def handle(self, payload: bytes) -> bytes | None:
        command = _decode_command(payload)
        if isinstance(command, Execute):
            result = self._runner.execute(command.batch)
            return None if result is None else _encode(result)
        if isinstance(command, InitCache):
            self._runner.init_cache(command.num_blocks)
            keep_what_is_loaded()
            return _encode(Ready(command.num_blocks))
        if isinstance(command, Load):
            self._loading = BackgroundLoad(self._runner, command.weights)
            self._load_state = LoadState(is_done=False)
            return None
        if isinstance(command, Drop):
            self._runner.drop(command.weight_version)
            return None
        self._look()
        return _encode(self._load_state)

    def _look(self) -> None:
        loading = self._loading
        if loading is None or not loading.done:
            return
        self._loading = None
        try:
            loading.hold()
            self._load_state = LoadState(is_done=True)
        except CheckpointError as error:
            self._load_state = LoadState(is_done=True, problem=(error.path, error.problem))


def create_handler(rank: int, world_size: int, config: bytes) -> RunnerHandler:
    """A `rayllm_cluster.shard.HandlerFactory`. torch.distributed is up where there are several ranks."""
    shard = msgspec.msgpack.decode(config, type=ShardConfig)
    parallel = shard.engine.parallel
    mesh = Mesh.single() if world_size == 1 else Mesh.from_world(parallel.tensor, parallel.pipeline)
    return RunnerHandler(load_runner(shard, mesh))
