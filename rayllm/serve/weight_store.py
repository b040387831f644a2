"""Where an endpoint's record of its weights is kept: in the key-value store of Ray's control service, so that it
outlives every replica and needs no process of its own.

Records lie side by side, each under its serial and never written over: of two changes at once one finds the other's in
its place. Each call is a round trip of about a millisecond; raises `ray.exceptions.RayError` when the service does not
answer.
"""

import hashlib

import msgspec
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.context import ReplicaContext

from rayllm.core.errors import PromotionError
from rayllm.serve.replica_directory import live_replicas
from rayllm.serve.weight_record import ReplicaReport, WeightRecord

_NAMESPACE = "rayllm"


class WeightStore:
    def __init__(self, endpoint: str, context: ReplicaContext) -> None:
        """`endpoint` names one deployment of an application: the next one begins with what its configuration says."""
        self._prefix = f"weights/{endpoint}"
        self._context = context
        self._seen: WeightRecord | None = None

    def read(self) -> WeightRecord | None:
        """The last one. None: nobody has changed the weights yet."""
        record = self._seen
        while (stored := self._get(f"record/{1 if record is None else record.serial + 1}")) is not None:
            record = msgspec.msgpack.decode(stored, type=WeightRecord)
        self._seen = record
        return record

    def write(self, record: WeightRecord) -> None:
        """Raises PromotionError when another change has come before."""
        key, value = f"record/{record.serial}", msgspec.msgpack.encode(record)
        # A call that Ray repeats finds its own
        if self._put(key, value, overwrite=False) and self._get(key) != value:
            raise PromotionError("another change of the weights took the place of this one")

    def gate(self, name: str) -> str:
        stored = self._get(f"gate/{name}")
        assert stored is not None, name
        return stored.decode()

    def keep_gate(self, text: str) -> str:
        """-> its name."""
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._put(f"gate/{name}", text.encode())
        return name

    def report(self, replica: str, report: ReplicaReport) -> None:
        self._put(f"replica/{replica}", msgspec.msgpack.encode(report))

    def reports(self) -> dict[str, ReplicaReport | None]:
        """Of every replica that is alive, those that start or drain included; None: it has said nothing yet."""
        return {replica: self._report(replica) for replica in live_replicas(self._context)}

    def _report(self, replica: str) -> ReplicaReport | None:
        stored = self._get(f"replica/{replica}")
        return None if stored is None else msgspec.msgpack.decode(stored, type=ReplicaReport)

    def _get(self, key: str) -> bytes | None:
        stored: bytes | None = _internal_kv_get(f"{self._prefix}/{key}", namespace=_NAMESPACE)
        return stored

    def _put(self, key: str, value: bytes, *, overwrite: bool = True) -> bool:
        """-> whether it was there already."""
        was_there: bool = _internal_kv_put(f"{self._prefix}/{key}", value, overwrite, namespace=_NAMESPACE)
        return was_there
