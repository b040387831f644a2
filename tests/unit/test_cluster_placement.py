"""The planner, without a cluster."""

import pytest

from rayllm_cluster.errors import PlacementError
from rayllm_cluster.placement import Node, check_feasible, order_bundles, plan_placement

CPU = {"CPU": 1.0}
GPU = {"CPU": 1.0, "GPU": 1.0}


def node(name: str, **resources: float) -> Node:
    return Node(node_id=name, address=f"10.0.0.{name}", resources=resources)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "strategy"), [(1, 1, "STRICT_PACK"), (4, 1, "STRICT_PACK"), (1, 2, "PACK"), (3, 2, "PACK")]
)
def test_a_bundle_for_the_driver_and_one_for_each_shard(tensor: int, pipeline: int, strategy: str) -> None:
    plan = plan_placement(tensor, pipeline, shard=GPU)
    assert plan.bundles == (CPU, *[GPU] * (tensor * pipeline))
    assert plan.strategy == strategy
    assert plan.num_shards == tensor * pipeline


@pytest.mark.parametrize(
    ("nodes", "strategy", "fits"),
    [
        ([node("1", CPU=8, GPU=4)], "STRICT_PACK", True),
        ([node("1", CPU=8, GPU=3)], "STRICT_PACK", False),
        ([node("1", CPU=3, GPU=4)], "STRICT_PACK", False),
        ([node("1", CPU=8, GPU=2), node("2", CPU=8, GPU=2)], "STRICT_PACK", False),
        ([node("1", CPU=8, GPU=2), node("2", CPU=8, GPU=2)], "PACK", True),
        ([node("1", CPU=8, GPU=3), node("2", CPU=8)], "PACK", False),
        ([node("1", CPU=1, GPU=4), node("2", CPU=2, GPU=4)], "PACK", False),
        ([node("1", CPU=8, GPU=1.5), node("2", CPU=8, GPU=2.5)], "PACK", False),
        ([], "PACK", False),
    ],
)
def test_what_a_cluster_can_hold(nodes: list[Node], strategy: str, fits: bool) -> None:
    if fits:
        check_feasible([GPU] * 4, strategy, nodes)
    else:
        with pytest.raises(PlacementError):
            check_feasible([GPU] * 4, strategy, nodes)


def test_the_error_says_what_is_asked_and_what_exists() -> None:
    nodes = [node("1", CPU=8, GPU=2), node("2", CPU=16, memory=1e9)]
    with pytest.raises(PlacementError) as caught:
        check_feasible([GPU] * 4, "STRICT_PACK", nodes)
    assert str(caught.value) == (
        "the shards need 4 CPU, 4 GPU on one node; the cluster has 8 CPU, 2 GPU; 16 CPU, 0 GPU"
    )
    with pytest.raises(PlacementError, match="need 4 times 1 CPU, 1 GPU; the cluster has no nodes"):
        check_feasible([GPU] * 4, "PACK", [])


def test_ranks_start_on_the_drivers_node_and_neighbours_share_one() -> None:
    assert order_bundles({1: "b", 2: "a", 3: "c", 4: "a", 5: "b"}, driver_node="b") == [1, 5, 2, 4, 3]
    assert order_bundles({0: "b", 1: "a", 2: "b"}, driver_node="elsewhere") == [1, 0, 2]
