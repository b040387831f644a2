"""The engine over real shards: the tokens of one process, the errors of the shards, and no process that outlives it."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.core.errors import CheckpointError, ConfigError, EngineUnavailableError
from rayllm.core.types import Request, SamplingParams
from rayllm.engine.build import build_engine, prepare, start_local
from rayllm.engine.engine import Engine
from rayllm.engine.ray_executor import _threads_per_shard, replica_placement, start_ray
from rayllm_cluster.session import Session
from tests.ray.processes import descendants, wait_gone

pytestmark = pytest.mark.ray

PROMPTS = [[7, 8, 9], [200], list(range(40)), [3] * 17]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1, seed=5, max_tokens=12, ignore_eos=True, logprobs=2),
]


def config_of(model: Path, tensor: int, pipeline: int, num_blocks: int | None = 64) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(model), dtype="float32", device="cpu"),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline),
        cache=CacheConfig(num_blocks=num_blocks, block_size=4),
        scheduler=SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=4),
    )


def add_requests(engine: Engine) -> None:
    for i, prompt in enumerate(PROMPTS):
        engine.add(Request(request_id=str(i), prompt_token_ids=tuple(prompt), params=PARAMS[i % len(PARAMS)]))


def run(engine: Engine) -> dict[str, list[int]]:
    add_requests(engine)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    while engine.has_work:
        for output in engine.step():
            if output.token_id is not None:
                tokens[output.request_id].append(output.token_id)
    return tokens


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model(intermediate_size=96)  # 6 heads, 3 kv heads and 96 split by three


def step_until_done(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    engine = build_engine(prepare(config_of(model, 1, 1)), start_local).engine
    return run(engine)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_tokens_do_not_depend_on_the_layout(
    session: Session, model: Path, expected: dict[str, list[int]], tensor: int, pipeline: int
) -> None:
    engine = build_engine(prepare(config_of(model, tensor, pipeline)), start_ray).engine
    try:
        assert run(engine) == expected
    finally:
        engine.close()
    assert ray.is_initialized(), "a Ray that was joined goes on"


def test_every_rank_holds_what_fits_on_the_fullest(session: Session, model: Path) -> None:
    """Without a fixed number: the last of two stages over three layers holds one layer, the first two."""
    config = config_of(model, 1, 2, num_blocks=None)
    config = replace(config, cache=replace(config.cache, cpu_memory_bytes=1 << 20))
    executor, num_blocks = start_ray(prepare(config))
    executor.close()
    _, of_all_layers = start_local(prepare(replace(config, parallel=ParallelConfig())))
    assert num_blocks == of_all_layers * 3 // 2


def test_without_time_for_recovery_a_lost_shard_makes_the_engine_unavailable(session: Session, model: Path) -> None:
    config = replace(config_of(model, 3, 1), parallel=ParallelConfig(tensor=3, shard_recovery_timeout_s=0))
    engine = build_engine(prepare(config), start_ray).engine
    try:
        add_requests(engine)
        engine.step()
        shards = {pid for pid in descendants(os.getpid()) if b"Shard.run" in Path(f"/proc/{pid}/cmdline").read_bytes()}
        assert len(shards) == 3
        os.kill(max(shards), signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(EngineUnavailableError, match=r"shard [012]: its process died"):
                step_until_done(engine)
        assert wait_gone(shards, 0) == set()
    finally:
        engine.close()


def test_a_checkpoint_that_a_shard_cannot_read(session: Session, make_tiny_model: Callable[..., Path]) -> None:
    model = make_tiny_model(intermediate_size=96)
    prepared = prepare(config_of(model, 3, 1))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])  # after the driver has looked at it
    with pytest.raises(CheckpointError) as caught:
        start_ray(prepared)
    assert caught.value.path == str(weights)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cluster has a GPU")
def test_a_cluster_that_has_no_gpu(session: Session, model: Path) -> None:
    config = replace(config_of(model, 3, 1), model=ModelConfig(model=str(model), device="cuda"))
    with pytest.raises(ConfigError, match=r"the shards need 3 CPU, 3 GPU on one node; the cluster has \d+ CPU, 0 GPU"):
        start_ray(prepare(config))


def test_replicas_share_the_cores_of_their_node(session: Session, make_tiny_model: Callable[..., Path]) -> None:
    prepared = prepare(config_of(make_tiny_model(hidden_size=240, intermediate_size=2000), 1, 1))
    logical = int(ray.cluster_resources()["CPU"])
    cores = min(len(os.sched_getaffinity(0)), logical)
    assert _threads_per_shard(prepared, 1) == cores
    assert _threads_per_shard(prepared, 2) == max(1, cores // 2)
    assert _threads_per_shard(prepared, 100) == max(1, cores // (logical // 2)), "more have no room"


def test_a_replica_asks_for_itself_and_its_shards(session: Session, model: Path) -> None:
    plan = replica_placement(config_of(model, 3, 1))
    assert (plan.bundles, plan.strategy) == (({"CPU": 1.0},) * 4, "STRICT_PACK")
    gpus = replace(config_of(model, 1, 2), model=ModelConfig(model=str(model), device="cuda"))
    plan = replica_placement(gpus)
    assert (plan.bundles, plan.strategy) == (({"CPU": 1.0}, *[{"CPU": 1.0, "GPU": 1.0}] * 2), "PACK")


def test_without_ray_one_is_started_and_ended(model: Path, expected: dict[str, list[int]]) -> None:
    if ray.is_initialized():
        ray.shutdown()
    before = descendants(os.getpid())
    engine = build_engine(prepare(config_of(model, 1, 3)), start_ray).engine
    started = descendants(os.getpid()) - before
    assert run(engine) == expected
    engine.close()
    assert not ray.is_initialized()
    assert wait_gone(started, 5) == set()
