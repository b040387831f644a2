"""Ray Train's process group, with gloo listening where the other workers can reach it."""

from typing import Any

from ray.train.torch import TorchConfig
from ray.util import get_node_ip_address

from rayllm_cluster.interface import LOOPBACK, listen_towards


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # which Ray does not export by name
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        addresses = worker_group.execute(get_node_ip_address)
        worker_group.execute(listen_towards, LOOPBACK if len(set(addresses)) == 1 else addresses[0])
        super().on_start(worker_group, backend_config)


class ReachableTorchConfig(TorchConfig):  # type: ignore[misc]  # Ray is not typed here
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
