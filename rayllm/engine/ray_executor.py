"""The executor over a group of shards. It knows the commands and what a lost shard means to a user; frames and actors
are `rayllm_cluster`'s."""

import math
import os
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import msgspec
import ray
import torch

from rayllm.core.config import EngineConfig
from rayllm.core.errors import CheckpointError, ConfigError, EngineUnavailableError, RayLLMError
from rayllm.engine.build import Prepared, ShardConfig
from rayllm.engine.commands import Answer, Command, Drop, Execute, Load, LoadState, Look
from rayllm.engine.executor import Recovery
from rayllm.engine.ranks import Ranks
from rayllm.engine.weights import Weights
from rayllm.scheduler.batch import Batch, StepResult
from rayllm_cluster.errors import (
    ClusterError,
    GroupClosedError,
    PlacementError,
    RemoteError,
    SessionError,
    ShardLostError,
)
from rayllm_cluster.placement import PlacementPlan, plan_placement
from rayllm_cluster.session import Session
from rayllm_cluster.shard_group import GroupOptions, ShardGroup

STEP_TIMEOUT_S = 120.0

# Two threads on two cores shorten a step of 8 rows by 6 % with 0.2 million parameters, 18 with 0.9 and 25 with 6.
_PARAMETERS_PER_THREAD = 1 << 19

_SHARD_FACTORY = "rayllm.engine.shard:create_handler"
_decode_answer: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class RayExecutor:
    def __init__(
        self,
        group: ShardGroup,
        ranks: Ranks,
        shard: ShardConfig,
        *,
        session: Session,
        step_timeout_s: float = STEP_TIMEOUT_S,
    ) -> None:
        """Takes over the ranks, which are started as `shard` says, with their group, and the session."""
        parallel = shard.engine.parallel
        self.in_flight = parallel.pipeline
        self._group = group
        self._ranks = ranks
        self._shard = shard
        self._session = session
        self._world_size = parallel.world_size
        self._sampling_rank = (parallel.pipeline - 1) * parallel.tensor
        self._recovery_timeout_s = parallel.shard_recovery_timeout_s
        self._step_timeout_s = step_timeout_s
        self._results: deque[StepResult] = deque()  # that came before an answer which was waited for
        self._loading = ""

    def submit(self, batch: Batch) -> None:
        self._send(Execute(batch))

    def collect(self) -> StepResult:
        if self._results:
            return self._results.popleft()
        result = self._receive(self._sampling_rank)
        assert isinstance(result, StepResult)
        self._ranks.answered()
        return result

    def load(self, weights: Weights) -> None:
        self._loading = weights.version
        self._send(Load(weights))

    def loaded(self) -> bool:
        self._send(Look())
        states = [self._load_state(rank) for rank in range(self._world_size)]
        if not all(state.is_done for state in states):
            return False
        problem = next((state.problem for state in states if state.problem is not None), None)
        if problem is not None:
            self._send(Drop(self._loading))
            raise CheckpointError(*problem)
        return True

    def drop(self, weights: Weights) -> None:
        self._send(Drop(weights.version))

    def check(self) -> None:
        try:
            self._group.check()
        except ClusterError as error:
            raise _unavailable(error) from error

    def recover(self, lost: EngineUnavailableError, held: Sequence[Weights]) -> Recovery:
        if not isinstance(lost.__cause__, ShardLostError):
            raise lost
        self._results.clear()
        self._shard = msgspec.structs.replace(self._shard, weights=tuple(held))
        try:
            return self._ranks.restart(lost.__cause__, _encode(self._shard))
        except (GroupClosedError, SessionError) as error:
            raise _unavailable(error) from error
        except ClusterError as error:
            raise EngineUnavailableError(
                f"{_unavailable(error)}, and no new shards were ready within {self._recovery_timeout_s:g} s"
            ) from error

    def close(self) -> None:
        self._ranks.close()
        self._session.stop()

    def _load_state(self, rank: int) -> LoadState:
        while isinstance(answer := self._receive(rank), StepResult):
            self._results.append(answer)
            self._ranks.answered()
        return answer

    def _send(self, command: Command) -> None:
        try:
            self._group.broadcast(_encode(command), timeout_s=self._step_timeout_s)
        except ClusterError as error:
            raise _unavailable(error) from error

    def _receive(self, rank: int) -> Answer:
        try:
            return _decode_answer.decode(self._group.recv(rank, timeout_s=self._step_timeout_s))
        except ClusterError as error:
            raise _unavailable(error) from error


def start_ray(prepared: Prepared, *, replicas: int = 1) -> tuple[RayExecutor, int]:
    """One Ray actor for each rank; returns the executor and how many KV blocks each rank holds.

    `replicas`: how many engines like this one there may be; as many as this node has room for will share its cores.

    Inside a Serve replica that was deployed with `replica_placement`, the ranks take the replica's bundles. Elsewhere
    Ray is joined, or started and then ended with the executor. A shard's ConfigError or CheckpointError is raised here.
    """
    config = prepared.config
    with ExitStack() as stack:
        try:
            session = stack.enter_context(Session.start(num_cpus=config.parallel.world_size))
            device = resolve_cluster_device(config)
            shard = msgspec.structs.replace(
                prepared.shard, engine=replace(config, model=replace(config.model, device=device))
            )
            options = GroupOptions(
                backend="nccl" if device == "cuda" else "gloo", threads=_threads_per_shard(prepared, replicas)
            )
            group = stack.enter_context(
                ShardGroup(_SHARD_FACTORY, _encode(shard), replica_placement(shard.engine), options)
            )
            ranks = Ranks(group, recovery_timeout_s=config.parallel.shard_recovery_timeout_s)
            ranks.start()
        except ClusterError as error:
            raise _start_error(error) from error
        stack.pop_all()
    return RayExecutor(group, ranks, shard, session=session), ranks.num_blocks


def replica_placement(config: EngineConfig) -> PlacementPlan:
    """The bundles and the strategy of one replica's placement group. Ray must be connected."""
    shard = {"CPU": 1.0} if resolve_cluster_device(config) == "cpu" else {"CPU": 1.0, "GPU": 1.0}
    return plan_placement(config.parallel.tensor, config.parallel.pipeline, shard=shard)


def resolve_cluster_device(config: EngineConfig) -> str:
    """The device of the shards, which need not be on this node: with "auto" GPUs, if the cluster has enough of them."""
    if config.model.device != "auto":
        return torch.device(config.model.device).type  # each shard sees one GPU only
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= config.parallel.world_size else "cpu"


def _threads_per_shard(prepared: Prepared, replicas: int) -> int:
    """Of this node's cores, counted as Ray does where that is fewer: it knows the limit of a container."""
    cores = len(os.sched_getaffinity(0))
    node_id = ray.get_runtime_context().get_node_id()
    logical = next(int(node["Resources"].get("CPU", cores)) for node in ray.nodes() if node["NodeID"] == node_id)
    checkpoint, ranks = prepared.checkpoint, prepared.config.parallel.world_size
    parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.parameters)
    replicas_here = min(replicas, logical // (ranks + 1))  # `replica_placement` asks for a CPU more than it has ranks
    return threads_per_shard(min(cores, logical), shards=ranks * max(1, replicas_here), parameters=parameters // ranks)


def threads_per_shard(cores: int, *, shards: int, parameters: int) -> int:
    """`shards`: how many share the cores; `parameters`: of one shard.

    Threads meet at the end of every kernel. Where they are more than cores, or than have work, they take the cores from
    each other, or from the rest of the endpoint, in order to wait there: two replicas of SmolLM2-135M with two threads
    each on two cores wrote 100 tokens a second, with one thread each 400.
    """
    return max(1, min(cores // shards, parameters // _PARAMETERS_PER_THREAD))


def _encode(message: Command | ShardConfig) -> bytes:
    return msgspec.msgpack.encode(message)


def _unavailable(error: ClusterError) -> EngineUnavailableError:
    """For clients: what a handler said stays in the log, since it may name paths."""
    if isinstance(error, ShardLostError) and error.error is not None:
        return EngineUnavailableError(f"shard {error.rank} failed with {error.error.type}")
    return EngineUnavailableError(str(error))


def _start_error(error: ClusterError) -> RayLLMError:
    if isinstance(error, PlacementError):
        return ConfigError(str(error))
    if isinstance(error, ShardLostError) and error.error is not None:
        return _rebuild(error.error) or EngineUnavailableError(str(error))
    return EngineUnavailableError(str(error))


def _rebuild(error: RemoteError) -> RayLLMError | None:
    if error.type == ConfigError.__name__:
        return ConfigError(error.message)
    if error.type == CheckpointError.__name__:
        path, _, problem = error.message.partition(": ")
        return CheckpointError(path, problem)
    return None
