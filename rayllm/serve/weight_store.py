"""Where an endpoint's record of its weights is kept: in the key-value store of Ray's control service, so that it
outlives every replica and needs no process of its own.

Each call is a round trip of about a millisecond; raises `ray.exceptions.RayError` when the service does not answer.
"""

import msgspec
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.context import ReplicaContext

from rayllm.serve.replica_directory import live_replicas
from rayllm.serve.weight_record import ReplicaReport, WeightRecord

_NAMESPACE = "rayllm"


class WeightStore:
    def __init__(self, endpoint: str, context: ReplicaContext) -> None:
        """`endpoint` names one deployment of an application: the next one begins with what its configuration says."""
        self._prefix = f"weights/{endpoint}"
        self._context = context

    def read(self) -> WeightRecord | None:
        """None: nobody has changed the weights yet."""
        stored = _internal_kv_get(f"{self._prefix}/record", namespace=_NAMESPACE)
        return None if stored is None else msgspec.msgpack.decode(stored, type=WeightRecord)

    def write(self, record: WeightRecord) -> None:
        self._put("record", msgspec.msgpack.encode(record))

    def gate(self) -> str:
        stored = _internal_kv_get(f"{self._prefix}/gate", namespace=_NAMESPACE)
        return "" if stored is None else stored.decode()

    def set_gate(self, text: str) -> None:
        self._put("gate", text.encode())

    def report(self, replica: str, report: ReplicaReport) -> None:
        self._put(f"replica/{replica}", msgspec.msgpack.encode(report))

    def reports(self) -> dict[str, ReplicaReport | None]:
        """Of every replica that is alive, those that start or drain included; None: it has said nothing yet."""
        return {replica: self._report(replica) for replica in live_replicas(self._context)}

    def _report(self, replica: str) -> ReplicaReport | None:
        stored = _internal_kv_get(f"{self._prefix}/replica/{replica}", namespace=_NAMESPACE)
        return None if stored is None else msgspec.msgpack.decode(stored, type=ReplicaReport)

    def _put(self, key: str, value: bytes) -> None:
        _internal_kv_put(f"{self._prefix}/{key}", value, namespace=_NAMESPACE)
