"""Where replicas find each other: addresses that stay as long as their replicas do."""

from dataclasses import dataclass

import pytest
import ray
from ray.serve._private.common import DeploymentID, ReplicaID

from rayllm.serve.replica_directory import ReplicaDirectory, live_replicas

pytestmark = pytest.mark.ray

DEPLOYMENT = DeploymentID(name="inference", app_name="rayllm")


@dataclass
class Context:
    """What is used of `ray.serve.context.ReplicaContext`."""

    replica_id: ReplicaID


@ray.remote(num_cpus=0)
class Actor:
    def ready(self) -> None:
        pass


def replica(name: str, deployment: DeploymentID = DEPLOYMENT) -> tuple[Context, ray.actor.ActorHandle]:
    """An actor named as Serve names its replicas."""
    identity = ReplicaID(unique_id=name, deployment_id=deployment)
    actor = Actor.options(name=identity.to_full_id_str(), namespace="serve").remote()
    ray.get(actor.ready.remote())
    return Context(identity), actor


def test_replicas_are_listed_until_they_leave_or_are_found_dead(session):
    elsewhere = DeploymentID("else", "rayllm")
    here, *actors = (
        replica("one") + replica("two")[1:] + replica("other", elsewhere)[1:]
    )  # an actor goes with its handle
    assert live_replicas(here) == {"one", "two"}
    directory, other = ReplicaDirectory("e1", here), ReplicaDirectory("e2", here)
    directory.join("one", ("10.0.0.1", 4001))
    directory.join("two", ("10.0.0.2", 4002))
    other.join("old", ("10.0.0.3", 4003))
    assert directory.replicas() == {"one": ("10.0.0.1", 4001), "two": ("10.0.0.2", 4002)}
    directory.clean()
    assert set(directory.replicas()) == {"one", "two"}
    ray.kill(actors[1])
    while live_replicas(here) != {"one"}:
        pass
    assert set(directory.replicas()) == {"one", "two"}, "nobody has looked"
    directory.clean()
    assert set(directory.replicas()) == {"one"}
    directory.leave("one")
    assert directory.replicas() == {}
    assert set(other.replicas()) == {"old"}, "another deployment's are none of its business"
