"""Where an endpoint's replicas find each other: addresses in the key-value store of Ray's control service. What else
they say goes from replica to replica.

Each call is a round trip of about a millisecond; raises `ray.exceptions.RayError` when the service does not answer.
"""

import msgspec
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put
from ray.serve.context import ReplicaContext
from ray.util import list_named_actors

from rayllm.serve.peer import Address

_NAMESPACE = "rayllm"


def live_replicas(context: ReplicaContext) -> set[str]:
    """Of the deployment that `context` is of, by their names, those that start or drain included."""
    prefix = context.replica_id.to_full_id_str().removesuffix(context.replica_id.unique_id)
    named = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return {name.removeprefix(prefix) for name in named if name.startswith(prefix)}


class ReplicaDirectory:
    def __init__(self, endpoint: str, context: ReplicaContext) -> None:
        """`endpoint` names one deployment of an application: replicas of another one are no peers."""
        self._prefix = f"replicas/{endpoint}/"
        self._context = context
        self._addresses: dict[str, Address] = {}  # those read before; a replica never changes its own

    def join(self, name: str, address: Address) -> None:
        _internal_kv_put(f"{self._prefix}{name}", msgspec.msgpack.encode(address), namespace=_NAMESPACE)

    def leave(self, name: str) -> None:
        _internal_kv_del(f"{self._prefix}{name}", namespace=_NAMESPACE)

    def replicas(self) -> dict[str, Address]:
        keys = _internal_kv_list(self._prefix, namespace=_NAMESPACE)
        names = [key.decode().removeprefix(self._prefix) for key in keys]
        self._addresses = {name: found for name in names if (found := self._address(name)) is not None}
        return self._addresses

    def clean(self) -> None:
        """Forget replicas that died without leaving."""
        for name in self._addresses.keys() - live_replicas(self._context):
            self.leave(name)

    def _address(self, name: str) -> Address | None:
        if name in self._addresses:
            return self._addresses[name]
        stored = _internal_kv_get(f"{self._prefix}{name}", namespace=_NAMESPACE)
        return None if stored is None else msgspec.msgpack.decode(stored, type=Address)
