"""Where the shards of one model run.

One replica is one placement group: a bundle for the process that drives the shards, then one for each shard. Tensor
parallel ranks talk in every layer, so they have to share a node (STRICT_PACK); pipeline stages talk once a step, so
they need only be near (PACK).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from rayllm_cluster.errors import PlacementError, SessionError

logger = logging.getLogger(__name__)

Resources = Mapping[str, float]  # of Ray: {"CPU": 1.0, "GPU": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementPlan:
    """`bundles[0]` is for the process that drives the shards; `bundles[1 + i]` is for a shard."""

    tensor: int
    pipeline: int
    bundles: tuple[dict[str, float], ...]
    strategy: str

    @property
    def num_shards(self) -> int:
        return self.tensor * self.pipeline


def plan_placement(tensor: int, pipeline: int, *, shard: Resources, driver: Resources | None = None) -> PlacementPlan:
    """`shard`: the resources of each shard; `driver`: those of the process that drives them, by default one CPU."""
    return PlacementPlan(
        tensor=tensor,
        pipeline=pipeline,
        bundles=(dict(driver or {"CPU": 1.0}), *(dict(shard) for _ in range(tensor * pipeline))),
        strategy="STRICT_PACK" if pipeline == 1 else "PACK",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    node_id: str
    address: str
    resources: Resources  # all that it has, used or not


def check_feasible(bundles: Sequence[Resources], strategy: str, nodes: Sequence[Node]) -> None:
    """Raises PlacementError when these nodes could not hold the bundles, all of one size, even if they were idle."""
    if strategy == "STRICT_PACK":
        total = {name: amount * len(bundles) for name, amount in bundles[0].items()}
        if any(_how_many(total, node.resources) for node in nodes):
            return
        asked = f"{_text(total)} on one node"
    else:
        if sum(_how_many(bundles[0], node.resources) for node in nodes) >= len(bundles):
            return
        asked = f"{len(bundles)} times {_text(bundles[0])}"
    have = "; ".join(_text({name: node.resources.get(name, 0.0) for name in bundles[0]}) for node in nodes)
    raise PlacementError(f"the shards need {asked}; the cluster has {have or 'no nodes'}")


def order_bundles(node_of_bundle: Mapping[int, str], *, driver_node: str) -> list[int]:
    """Bundle indices by rank: those on the driver's node first, then node by node, so that neighbours share a node."""
    return sorted(node_of_bundle, key=lambda i: (node_of_bundle[i] != driver_node, node_of_bundle[i], i))


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where one rank runs."""

    bundle_index: int
    node: Node


class Placement:
    """The bundles of a group's shards, by rank. `release` gives them back if they are this placement's own."""

    slots: tuple[Slot, ...]
    driver: Node

    def __init__(self, plan: PlacementPlan, group: PlacementGroup, *, owned: bool) -> None:
        """`group` holds the plan's bundles, but for the first if it is `owned`. `locate` says where."""
        self.group = group
        self.shard: Resources = plan.bundles[1]
        self._plan = plan
        self._owned = owned

    def locate(self, timeout_s: float) -> None:
        """Find out where the bundles are: Ray moves those of a node that is gone. Sets `slots` and `driver`.

        Raises PlacementError when they are nowhere within that time or Ray cannot tell, SessionError when it has ended.
        """
        if not ray.is_initialized():  # else the calls below would start a Ray of their own
            raise SessionError("Ray was shut down")
        try:
            if not self.group.wait(timeout_s):
                free = _text({name: ray.available_resources().get(name, 0.0) for name in self.shard})
                asked = f"{self._plan.num_shards} times {_text(self.shard)}"
                raise PlacementError(f"no room for {asked} within {timeout_s:g} s; {free} are free")
            nodes = {node.node_id: node for node in _live_nodes()}
            self.driver = nodes[ray.get_runtime_context().get_node_id()]
            self.slots = tuple(_slots(self._plan, self.group, 0 if self._owned else 1, nodes, self.driver))
        except ray.exceptions.RayError as error:
            raise PlacementError(f"Ray cannot place the shards: {str(error).splitlines()[0]}") from error

    def release(self) -> None:
        if self._owned and ray.is_initialized():
            remove_placement_group(self.group)
        self._owned = False


def place(plan: PlacementPlan, *, timeout_s: float) -> Placement:
    """Take bundles 1.. of the placement group that this process runs in, or else create one for the shards alone.

    Raises PlacementError when the cluster cannot hold the shards (as it is now: nodes that an autoscaler might add do
    not count) or has not the room within `timeout_s`.
    """
    group = get_current_placement_group()
    if group is not None:
        if group.bundle_count != len(plan.bundles):
            raise PlacementError(
                f"this process runs in a placement group of {group.bundle_count} bundles; "
                f"{plan.num_shards} shards need {len(plan.bundles)}"
            )
        placement = Placement(plan, group, owned=False)
    else:
        bundles = plan.bundles[1:]
        check_feasible(bundles, plan.strategy, _live_nodes())
        group = placement_group([dict(bundle) for bundle in bundles], strategy=plan.strategy)
        placement = Placement(plan, group, owned=True)
    try:
        placement.locate(timeout_s)
    except BaseException:
        placement.release()
        raise
    return placement


def _slots(
    plan: PlacementPlan, group: PlacementGroup, first: int, nodes: Mapping[str, Node], driver: Node
) -> list[Slot]:
    node_of_bundle: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    shards = {index: node for index, node in node_of_bundle.items() if index >= first}
    if not nodes.keys() >= set(shards.values()):
        raise PlacementError("a node that held shards is gone")
    slots = [Slot(bundle_index=i, node=nodes[shards[i]]) for i in order_bundles(shards, driver_node=driver.node_id)]
    for stage in range(plan.pipeline):
        ranks = slots[stage * plan.tensor : (stage + 1) * plan.tensor]
        if len(list(groupby(ranks, key=lambda slot: slot.node.node_id))) > 1:
            logger.warning("The tensor parallel ranks of stage %d are on several nodes; expect slow steps", stage)
    return slots


def _live_nodes() -> list[Node]:
    return [
        Node(node_id=node["NodeID"], address=node["NodeManagerAddress"], resources=node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def _how_many(bundle: Resources, resources: Resources) -> int:
    return min(int(resources.get(name, 0.0) // amount) for name, amount in bundle.items() if amount)


def _text(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
