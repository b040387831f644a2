"""An endpoint's record of its weights in Ray's control service: changes come one after another, whoever makes them."""

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID

from rayllm.core.errors import PromotionError
from rayllm.engine.weights import Weights
from rayllm.serve.weight_record import Candidate, WeightRecord
from rayllm.serve.weight_store import WeightStore
from tests.ray.test_replica_directory import Context

pytestmark = pytest.mark.ray

OLD, ONE, OTHER = (Weights(name, f"/{name}") for name in ("old", "one", "other"))


@pytest.fixture
def stores(session) -> tuple[WeightStore, WeightStore]:
    """As two replicas have them."""
    identity = ReplicaID(unique_id="r", deployment_id=DeploymentID(name="inference", app_name="rayllm"))
    return WeightStore("here", Context(identity)), WeightStore("here", Context(identity))


def test_of_two_changes_at_once_one_is_refused(stores):
    one, other = stores
    assert one.read() is None
    first = WeightRecord(1, OLD, None, Candidate(ONE, ("r",)))
    one.write(first)
    one.write(first)  # as when Ray repeats a call whose answer was lost
    with pytest.raises(PromotionError, match="another change"):
        other.write(WeightRecord(1, OLD, None, Candidate(OTHER, ("r",))))
    assert one.read() == other.read() == first
    other.write(first.taken())
    with pytest.raises(PromotionError, match="another change"):
        one.write(first.withdrawn())
    assert one.read() == other.read() == WeightRecord(2, ONE, OLD)


def test_each_promotion_keeps_its_gate(stores):
    one, other = stores
    names = [one.keep_gate("a text"), other.keep_gate("another text"), other.keep_gate("a text")]
    assert names[0] == names[2] != names[1]
    assert [other.gate(name) for name in names] == ["a text", "another text", "a text"]
