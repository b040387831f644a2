"""What a user decides about an endpoint, beyond its engine."""

from dataclasses import dataclass

from rayllm.core.config import EngineConfig
from rayllm.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """`model_name`: what clients call the model; None: the last part of the model's path or hub name.

    `max_request_s` ends any request, whatever its own deadline. `drain_timeout_s` is how long a replica that is to end
    (scaling down, an update, a shutdown) waits for the requests that are running.
    """

    engine: EngineConfig
    model_name: str | None = None
    http_port: int = 8000
    grpc_port: int = 9000
    num_replicas: int = 1
    max_request_s: float = 3600.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name}: {getattr(self, name)} is not in [1, 65535]")
        if self.http_port == self.grpc_port:
            raise ConfigError(f"http_port and grpc_port are both {self.http_port}")
        if self.num_replicas < 1:
            raise ConfigError(f"num_replicas: {self.num_replicas} is less than 1")
        if not self.max_request_s > 0:
            raise ConfigError(f"max_request_s: {self.max_request_s} is not positive")
        if not self.drain_timeout_s >= 0:
            raise ConfigError(f"drain_timeout_s: {self.drain_timeout_s} is negative")

    @property
    def served_model(self) -> str:
        return self.model_name or self.engine.model.model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
