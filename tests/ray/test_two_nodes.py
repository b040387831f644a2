"""Shards on another node than their driver: TCP in place of AF_UNIX. Two nodes of Ray's on one machine."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from rayllm.core.config import CacheConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm_cluster.diagnosis import diagnose
from rayllm_cluster.errors import PlacementError, ShardLostError
from rayllm_cluster.examine import examine
from rayllm_cluster.hub import DIED
from rayllm_cluster.placement import plan_placement
from rayllm_cluster.session import Session
from rayllm_cluster.shard_group import ShardGroup
from tests.ray.processes import descendants, wait_gone

pytestmark = pytest.mark.ray


@pytest.fixture(params=[1])
def two_nodes(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The parameter: how many CPUs each has."""
    before = descendants(os.getpid())
    node = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": request.param, **node})
    cluster.add_node(num_cpus=request.param, object_store_memory=80 << 20)
    try:
        with Session.start(address=cluster.address):
            yield cluster
    finally:
        cluster.shutdown()
        assert wait_gone(descendants(os.getpid()) - before, 10) == set()


def test_a_pipeline_over_two_nodes(two_nodes: Cluster) -> None:
    with ShardGroup("tests.ray.shards:create_echo", b"", plan_placement(1, 2, shard={"CPU": 1.0})) as group:
        group.start(timeout_s=60)
        here = ray.get_runtime_context().get_node_id()
        nodes = [slot.node.node_id for slot in group._placement.slots]
        assert nodes[0] == here
        assert nodes[1] != here
        payload = os.urandom(1_000_000)
        group.broadcast(b"step " + payload, timeout_s=10)
        assert group.recv(1, timeout_s=10) == payload
        group.broadcast(b"reduce 1", timeout_s=10)
        assert [group.recv(rank, timeout_s=10) for rank in (0, 1)] == [b"3.0", b"3.0"]
        before = time.monotonic()
        group.broadcast(b"kill-in-collective 1", timeout_s=10)
        with pytest.raises(ShardLostError, match=f"shard 1: {DIED}"):
            group.recv(0, timeout_s=20)
        assert time.monotonic() - before < 2
        assert wait_gone({json.loads(ready)["pid"] for ready in group.ready}, 2) == set()


def test_the_doctor_sees_both_nodes_and_leaves_nothing(two_nodes: Cluster) -> None:
    facts = examine(plan_placement(1, 2, shard={"CPU": 1.0}))
    assert [each.rank for each in facts] == [0, 1]
    for each in facts:
        assert each.interface is not None
        assert (each.unreachable, each.rendezvous) == (None, None)
        assert abs(each.skew_s) <= each.skew_error_s + 0.05, "one machine has one clock"
        assert each.free_memory_bytes > 0
    wrong = [finding.check for finding in diagnose(facts) if finding.problem is not None]
    assert set(wrong) <= {"shared memory", "memory"}, "what this machine may have too little of"
    with pytest.raises(PlacementError, match="the shards need 2 CPU on one node; the cluster has 1 CPU; 1 CPU"):
        examine(plan_placement(2, 1, shard={"CPU": 1.0}))
    give_up = time.monotonic() + 10
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < give_up
        time.sleep(0.1)


@pytest.mark.parametrize("two_nodes", [2], indirect=True)
def test_a_pipeline_over_two_nodes_of_two_tensor_ranks_each(
    two_nodes: Cluster, make_tiny_model: Callable[..., Path]
) -> None:
    model = make_tiny_model(num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    prompts, params = ["Once upon a time", "x" * 100], SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    cache = CacheConfig(num_blocks=100)
    with LLM(str(model), cache=cache) as alone:
        expected = [output.outputs[0].token_ids for output in alone.generate(prompts, params)]
    with LLM(str(model), cache=cache, tensor_parallel_size=2, pipeline_parallel_size=2) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        (group,) = (group for group in placement_group_table().values() if group["state"] == "CREATED")
        assert sorted(Counter(group["bundles_to_node_id"].values()).values()) == [2, 2]
    assert tokens == expected
