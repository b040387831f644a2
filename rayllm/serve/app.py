"""The Serve application: one deployment that is the HTTP ingress and the gRPC servicer at once."""

import secrets
import uuid
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, HTTPOptions, gRPCOptions

from rayllm.core.errors import ConfigError
from rayllm.engine.ray_executor import replica_placement
from rayllm.serve.autoscaling import EnginePolicy
from rayllm.serve.config import ServeConfig
from rayllm.serve.deployment import Endpoint, InferenceReplica
from rayllm.serve.recent_ttft import WINDOW_S
from rayllm.serve.settings import check_sections, serve_config
from rayllm_cluster.handshake import KEY_BYTES

APP_NAME = "rayllm"

# Requests that a replica holds beside those its engine runs or queues: health checks, metrics, and those about to be
# refused. The engine's own bounded queue is what pushes back; Serve's only has to be wider.
_BESIDE_THE_ENGINE = 256

# Replicas' figures are averaged over so long before they count; Serve takes them five times in it.
# Serve will insist on more than its ten seconds between two of something else.
_LOOK_BACK_S = 11.0


def build_app(config: ServeConfig) -> serve.Application:
    """Ray must be connected: where the shards go depends on what the cluster has.

    Each call makes an endpoint with a name of its own, whose weights are the configuration's until they are changed.
    """
    scheduler = config.engine.scheduler
    placement = replica_placement(config.engine)
    deployment = serve.deployment(
        serve.ingress()(InferenceReplica),
        name="inference",
        num_replicas=config.num_replicas if config.max_replicas is None else "auto",
        autoscaling_config=_autoscaling(config),
        ray_actor_options={"num_cpus": 1},
        placement_group_bundles=list(placement.bundles),
        placement_group_strategy=placement.strategy,
        max_ongoing_requests=scheduler.max_num_seqs + scheduler.max_waiting_requests + _BESIDE_THE_ENGINE,
        max_queued_requests=_BESIDE_THE_ENGINE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        max_constructor_retry_count=1,
    )
    return deployment.bind(config, Endpoint(uuid.uuid4().hex, secrets.token_bytes(KEY_BYTES)))


def from_settings(settings: dict[str, Any]) -> serve.Application:
    """What Serve calls with the `args` of an application whose import path names this: the tables of a configuration
    file. Ports are Serve's to decide there (`http_options`, `grpc_options`). Raises ConfigError."""
    check_direct_ingress()
    return build_app(serve_config(check_sections("args", settings)))


def _autoscaling(config: ServeConfig) -> AutoscalingConfig | None:
    if config.max_replicas is None:
        return None
    settle_s = WINDOW_S + _LOOK_BACK_S  # for figures of before a change to be forgotten
    return AutoscalingConfig(
        min_replicas=config.min_replicas,
        initial_replicas=max(1, config.min_replicas),
        max_replicas=config.max_replicas,
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=0.0,  # the policy's own: Serve's takes the last moment for the whole time
        policy=AutoscalingPolicy(
            policy_function=EnginePolicy,
            policy_kwargs={
                "target_ttft_s": config.target_ttft_s,
                "settle_s": settle_s,
                "downscale_window_s": config.downscale_delay_s,
            },
        ),
    )


def http_options(config: ServeConfig) -> HTTPOptions:
    return HTTPOptions(port=config.http_port)


def grpc_options(config: ServeConfig) -> gRPCOptions:
    return gRPCOptions(
        port=config.grpc_port,
        grpc_servicer_functions=[
            "rayllm.serve.grpc_service.add_inference_to_server",
            "rayllm.serve.grpc_service.add_health_to_server",
        ],
        enable_reflection=True,
    )


def check_direct_ingress() -> None:
    """A stream that is refused before its first message needs direct ingress: Serve's Python proxy would lose the
    status and end it as if it had succeeded."""
    from ray.serve._private.constants import RAY_SERVE_ENABLE_DIRECT_INGRESS

    if not RAY_SERVE_ENABLE_DIRECT_INGRESS:
        raise ConfigError(
            "Ray Serve was imported without RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1; "
            "set both before Ray starts"
        )
