"""Shards on another node than their driver: TCP in place of AF_UNIX. Two nodes of Ray's on one machine."""

import json
import os
import time
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from rayllm_cluster.errors import ShardLostError
from rayllm_cluster.hub import DIED
from rayllm_cluster.placement import plan_placement
from rayllm_cluster.session import Session
from rayllm_cluster.shard_group import ShardGroup
from tests.ray.processes import descendants, wait_gone

pytestmark = pytest.mark.ray


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    before = descendants(os.getpid())
    node = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **node})
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
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
