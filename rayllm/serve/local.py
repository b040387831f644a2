"""An endpoint on this machine: starts a Ray of its own, serves, and leaves nothing behind."""

import io
import logging
import math
import os
import random
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import httpx
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from rayllm.core.errors import ConfigError, EngineUnavailableError
from rayllm.engine.build import prepare
from rayllm.serve.admin_key import VARIABLE, local_key
from rayllm.serve.config import ServeConfig
from rayllm_cluster.errors import SessionError
from rayllm_cluster.session import Session

logger = logging.getLogger(__name__)

_MAX_GRPC_MESSAGE_BYTES = 16 << 20
# Between the ports of Ray's workers and those that Serve gives its replicas for HTTP.
_SIDE_PORTS = range(20000, 25000)
_GRPC_BLOCKS = [range(first, first + 100) for first in range(25000, 30000, 100)]
_ROUTE_S = 15.0  # for the proxy to know the replica
_STOP_S = 15.0  # for a replica to end once it is drained


@dataclass(kw_only=True, slots=True)
class LocalServer:
    """A running endpoint. `stop` (or leaving the `with`) drains it, and ends every process that it started."""

    http_url: str
    grpc_address: str
    model: str
    _stack: ExitStack

    def stop(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def serve_local(config: ServeConfig) -> LocalServer:
    """Returns once the endpoint answers. Raises ConfigError or CheckpointError with one line that names the cause: all
    that can be found wrong without a process of Ray's is looked for before any is started."""
    _check_port("http_port", config.http_port)
    _check_port("grpc_port", config.grpc_port)
    prepare(config.engine)
    with ExitStack() as stack:
        stack.enter_context(_ray(config))
        stack.enter_context(_application(config))
        http_url, grpc_address = f"http://127.0.0.1:{config.http_port}", f"127.0.0.1:{config.grpc_port}"
        _await_answers(http_url, grpc_address)
        return LocalServer(
            http_url=http_url, grpc_address=grpc_address, model=config.served_model, _stack=stack.pop_all()
        )


@contextmanager
def _ray(config: ServeConfig) -> Iterator[None]:
    with _grpc_block() as grpc_ports, local_key(config.http_port) as admin_key:
        directory = Path(tempfile.mkdtemp(prefix="rayllm-serve-"))
        environment = _environment(directory, config, grpc_ports, admin_key)
        os.environ.update(environment)
        try:
            with _serve(config):
                yield
        finally:
            for name in environment:
                del os.environ[name]
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _serve(config: ServeConfig) -> Iterator[None]:
    import ray
    from ray import serve

    from rayllm.serve.app import check_direct_ingress, grpc_options, http_options

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    check_direct_ingress()
    # A logical CPU for each rank and one for what drives them, however few the machine has.
    with _session(config.most_replicas * (config.engine.parallel.world_size + 1)):
        try:
            serve.start(http_options=http_options(config), grpc_options=grpc_options(config))
        except ray.exceptions.RayError as error:
            raise EngineUnavailableError(f"Ray Serve did not start: {_cause(str(error))}") from error
        try:
            yield
        finally:
            # Ray reports on stdout that the controller is gone, which is what it was asked for.
            with redirect_stdout(io.StringIO()):
                serve.shutdown()


def _session(num_cpus: int) -> Session:
    import ray

    if ray.is_initialized() or "RAY_ADDRESS" in os.environ:
        raise ConfigError(
            "a local endpoint starts a Ray of its own, but RAY_ADDRESS is set or Ray is connected already"
        )
    try:
        return Session.start(num_cpus=num_cpus)
    except SessionError as error:
        raise EngineUnavailableError(str(error)) from error


@contextmanager
def _application(config: ServeConfig) -> Iterator[None]:
    from ray import serve

    from rayllm.serve.app import APP_NAME, build_app

    try:
        serve.run(build_app(config), name=APP_NAME)
    except RuntimeError as error:
        deployments = serve.status().applications[APP_NAME].deployments.values()
        report = "\n".join(deployment.message for deployment in deployments)
        raise EngineUnavailableError(f"the replica did not start: {_cause(report)}") from error
    yield
    # Shutting Serve down would cut the streams at once, for it kills the proxy first; deleting the application lets
    # its replicas answer what they have. Serve ends a replica that takes longer than its time.
    give_up = time.monotonic() + config.drain_timeout_s + _STOP_S
    serve.delete(APP_NAME, _blocking=False)
    while APP_NAME in serve.status().applications and time.monotonic() < give_up:
        time.sleep(0.1)


def _await_answers(http_url: str, grpc_address: str) -> None:
    """HAProxy hears of a replica a moment after Serve calls it ready."""
    give_up = time.monotonic() + _ROUTE_S
    with grpc.insecure_channel(grpc_address) as channel, httpx.Client(base_url=http_url, timeout=_ROUTE_S) as http:
        health = HealthStub(channel)
        while True:
            try:
                http.get("/health").raise_for_status()
                health.Check(HealthCheckRequest(), timeout=_ROUTE_S)
                return
            except (httpx.HTTPError, grpc.RpcError) as error:
                if time.monotonic() > give_up:
                    raise EngineUnavailableError(f"the endpoint does not answer: {_cause(str(error))}") from error
                time.sleep(0.05)


def _cause(report: str) -> str:
    """What went wrong, out of Ray's report with its tracebacks: our own error, else the last line."""
    found = re.findall(r"^rayllm\.core\.errors\.\w+: (.+)$", report, re.MULTILINE)
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return (found or lines or ["no reason was given"])[-1]


def _environment(directory: Path, config: ServeConfig, grpc_ports: range, admin_key: str) -> dict[str, str]:
    """What Serve reads when it is first imported, here and in every process of Ray's.

    HAProxy in front of replicas that listen themselves; its files and side ports its own, so that several endpoints may
    share a machine.
    """
    stats, metrics, fallback_http, fallback_grpc = (str(port) for port in _free_ports(4))
    defaults = {
        VARIABLE: admin_key,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Serve's controller takes 3 % of a core to look ten times a second at an endpoint that changes by the minute.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        # HAProxy is started anew after three checks that fail; by default ten seconds lie between two.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(_MAX_GRPC_MESSAGE_BYTES),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_haproxy(directory)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        # For a client that has stopped reading its answer, or sending its request; by default an hour. One that waits
        # for an answer is not meant.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # HAProxy starts anew whenever a replica comes or goes. The old one goes on with its streams for so long; by
        # default two minutes, after which it would cut them.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(config.max_request_s)),
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback_http,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": fallback_grpc,
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc_ports.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc_ports.stop - 1),
    }
    return {name: value for name, value in defaults.items() if name not in os.environ}


def _haproxy(directory: Path) -> Path:
    """Serve wants the path of one file."""
    script = directory / "haproxy"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rayllm.serve.haproxy "$@"\n')
    script.chmod(0o700)
    return script


def _check_port(name: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            raise ConfigError(f"{name}: port {port} cannot be used: {str(error.strerror).lower()}") from None


@contextmanager
def _grpc_block() -> Iterator[range]:
    """Ports for the replicas' gRPC that no other endpoint of this machine uses, for as long as it is entered.

    A replica cannot tell that a port is taken: Serve asks gRPC not to share ports, but by a text where gRPC wants a
    number and overlooks all else. Two endpoints would then answer each other's requests. The block's first port is
    the claim to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as claim:
        for block in random.sample(_GRPC_BLOCKS, len(_GRPC_BLOCKS)):
            try:
                claim.bind(("0.0.0.0", block.start))
                claim.listen()
            except OSError:
                continue
            yield block[1:]
            return
        raise ConfigError(f"no free ports for gRPC in {_GRPC_BLOCKS[0].start}-{_GRPC_BLOCKS[-1].stop - 1}")


def _free_ports(count: int) -> list[int]:
    """Not of the kernel's choosing: Ray opens many of those before Serve comes to use these."""
    free = []
    for port in random.sample(_SIDE_PORTS, len(_SIDE_PORTS)):
        with suppress(ConfigError):
            _check_port("side port", port)
            free.append(port)
        if len(free) == count:
            return free
    raise ConfigError(f"no {count} free ports in {_SIDE_PORTS.start}-{_SIDE_PORTS.stop - 1}")
