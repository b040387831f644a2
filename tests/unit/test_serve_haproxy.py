"""What HAProxy says of a replica that is gone, by either face, and how it is started."""

import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from rayllm.serve.haproxy import mend
from rayllm.serve.local import _haproxy
from tests.ports import free_ports


def test_nothing_is_not_found_and_nothing_is_500(tmp_path: Path) -> None:
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(HAPROXY_CONFIG_TEMPLATE)
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error")
    assert HAPROXY_CONFIG_TEMPLATE.count("hdr grpc-status 5 ") == 2
    mend(configuration)
    mended = configuration.read_text()
    assert "grpc-status 5 " not in mended
    assert mended.count("grpc-status 14 ") == HAPROXY_CONFIG_TEMPLATE.count("grpc-status 14 ") + 2
    head, _, body = (tmp_path / "500.http").read_bytes().partition(b"\r\n\r\n")
    status, *headers = head.decode().splitlines()
    assert status == "HTTP/1.1 503 Service Unavailable"
    assert dict(line.split(": ") for line in headers) == {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "retry-after": "1",
    }
    assert json.loads(body)["error"]["code"] == "unavailable"


def test_what_serve_starts_is_haproxy(tmp_path: Path) -> None:
    directory = tmp_path / "node's own"
    directory.mkdir()
    (directory / "haproxy.cfg").write_text("no configuration")
    script = _haproxy(tmp_path)
    environment = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script)}
    command = [script, "-c", "-f", directory / "haproxy.cfg"]
    run = subprocess.run(command, capture_output=True, check=False, env=environment, timeout=60)
    assert run.returncode == 1
    assert b"parsing [" in run.stderr
    assert b"haproxy.cfg:1]" in run.stderr, "it is HAProxy that reads its configuration"


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Replica)
        self.asked = threading.Event()
        self.may_answer = threading.Event()


class Replica(BaseHTTPRequestHandler):
    """Keeps its connections; dies of what is posted; answers `/long` when it may."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self.path == "/long":
            self.server.asked.set()
            self.server.may_answer.wait()
        name = str(self.server.server_port).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(name)))
        self.end_headers()
        self.wfile.write(name)

    def do_POST(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@contextmanager
def haproxy_before(directory: Path, count: int = 1) -> Iterator[tuple[str, list[Server]]]:
    """HAProxy as Serve configures and starts it; -> its address, and the replicas."""
    with ExitStack() as stack:
        replicas = [stack.enter_context(Server()) for _ in range(count)]
        for replica in replicas:
            threading.Thread(target=replica.serve_forever, daemon=True).start()
        port, metrics = free_ports(2)
        settings = HAProxyConfig(
            socket_path=str(directory / "admin.sock"),
            server_state_base=str(directory),
            server_state_file=str(directory / "server-state"),
            metrics_port=metrics,
            inject_process_id_header=False,
            error_file_path=str(directory / "500.http"),
        )
        settings.http_options.host, settings.http_options.port = "127.0.0.1", port
        servers = [ServerConfig(f"replica{each.server_port}", "127.0.0.1", each.server_port) for each in replicas]
        api = HAProxyApi(settings, {"app": BackendConfig("app", "/", servers=servers)}, str(directory / "haproxy.cfg"))
        (directory / "500.http").write_text("HTTP/1.1 500 Internal Server Error")
        api._generate_config_file_internal()
        process = subprocess.Popen([_haproxy(directory), "-db", "-f", directory / "haproxy.cfg"])
        try:
            give_up = time.monotonic() + 30
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/x").raise_for_status()
                    break
                except httpx.HTTPError:
                    assert process.poll() is None
                    assert time.monotonic() < give_up
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}", replicas
        finally:
            process.terminate()
            process.wait(timeout=10)
            for replica in replicas:
                replica.shutdown()


@pytest.mark.parametrize("asked_before", [False, True], ids=["a new client", "a client that has had answers"])
def test_a_replica_that_dies_over_a_request_is_told(tmp_path: Path, asked_before: bool) -> None:
    """And not by a connection closed without a word, which is what HAProxy does to a request on a connection that has
    carried another one to the replica."""
    with haproxy_before(tmp_path) as (url, _), httpx.Client(base_url=url) as client:
        for _ in range(4 * asked_before):
            client.get("/x").raise_for_status()
        for _ in range(4):
            httpx.get(f"{url}/x").raise_for_status()
        answer = client.post("/x", json={})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert answer.headers["retry-after"] == "1"


def test_a_client_reaches_both_replicas_beside_a_long_answer(tmp_path: Path) -> None:
    """By least connections it would stay at the one that has none."""
    with haproxy_before(tmp_path, 2) as (url, replicas), ThreadPoolExecutor(1) as pool:
        long = pool.submit(httpx.get, f"{url}/long", timeout=60)
        try:
            while not any(replica.asked.wait(0.01) for replica in replicas):
                pass
            by = Counter(httpx.get(f"{url}/x").text for _ in range(8))
        finally:
            for replica in replicas:
                replica.may_answer.set()
        long.result().raise_for_status()
    assert by == {str(replica.server_port): 4 for replica in replicas}
