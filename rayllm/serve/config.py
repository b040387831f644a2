"""What a user decides about an endpoint, beyond its engine."""

import math
from dataclasses import dataclass

from rayllm.core.config import EngineConfig
from rayllm.core.errors import ConfigError
from rayllm.serve.routing import POLICIES


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """`model_name`: what clients call the model; None: the last part of the model's path or hub name.

    `max_request_s` ends any request, whatever its own deadline. `drain_timeout_s` is how long a replica that is to end
    (scaling down, an update, a shutdown) waits for the requests that are running.

    With `max_replicas` there are as many replicas as the load needs, at least `min_replicas`, which may be 0; without,
    always `num_replicas`. `target_ttft_s`: a time to first token above it asks for more. A need must have lasted for
    `upscale_delay_s` before replicas are added, and the lack of one for `downscale_delay_s` before any is ended.

    `routing` decides which of several replicas answers a request: "prefix", one that holds the beginning of its prompt
    or answers its session, if that is worth more than what waits there; "power-of-two", the less loaded of the proxy's
    choice and another one; "none", the proxy's choice.
    """

    engine: EngineConfig
    model_name: str | None = None
    http_port: int = 8000
    grpc_port: int = 9000
    num_replicas: int = 1
    min_replicas: int = 1
    max_replicas: int | None = None
    target_ttft_s: float = 1.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0
    max_request_s: float = 3600.0
    drain_timeout_s: float = 30.0
    routing: str = "prefix"

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name}: {getattr(self, name)} is not in [1, 65535]")
        if self.http_port == self.grpc_port:
            raise ConfigError(f"http_port and grpc_port are both {self.http_port}")
        if self.num_replicas < 1:
            raise ConfigError(f"num_replicas: {self.num_replicas} is less than 1")
        self._check_autoscaling()
        if self.routing not in POLICIES:
            raise ConfigError(f"routing: {self.routing!r} is not one of {', '.join(POLICIES)}")
        if not 0 < self.max_request_s < math.inf:
            raise ConfigError(f"max_request_s: {self.max_request_s} is not a positive number of seconds")
        if not 0 <= self.drain_timeout_s < math.inf:
            raise ConfigError(f"drain_timeout_s: {self.drain_timeout_s} is not a number of seconds")

    def _check_autoscaling(self) -> None:
        if self.max_replicas is None:
            if self.min_replicas != 1:
                raise ConfigError("min_replicas is for a number of replicas that changes; max_replicas is missing")
            return
        if self.num_replicas != 1:
            raise ConfigError(
                "num_replicas is a fixed number and max_replicas asks for one that changes; leave one out"
            )
        if self.max_replicas < 1:
            raise ConfigError(f"max_replicas: {self.max_replicas} is less than 1")
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(f"min_replicas: {self.min_replicas} is not in [0, {self.max_replicas}]")
        if not 0 < self.target_ttft_s < math.inf:
            raise ConfigError(f"target_ttft_s: {self.target_ttft_s} is not a positive number of seconds")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a number of seconds")

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.num_replicas

    @property
    def is_routed(self) -> bool:
        """Replicas send requests on to each other."""
        return self.most_replicas > 1 and self.routing != "none"

    @property
    def served_model(self) -> str:
        return self.model_name or self.engine.model.model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
