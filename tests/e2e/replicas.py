"""An endpoint of several replicas, from a configuration's sections, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx

from tests.ports import free_ports

SCRIPT = """
import contextlib
import json
import signal
import sys
import threading
import ray
from rayllm.cli.config_file import serve_config
from rayllm.serve.local import serve_local

with serve_local(serve_config(json.loads(sys.argv[1]))):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background with SIGINT ignored
    node = ray.nodes()[0]
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    print(json.dumps({"metrics": metrics}), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
"""


@dataclass
class Replicas:
    process: subprocess.Popen[str]
    url: str
    grpc_address: str
    metrics_url: str

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.grpc_address)


@contextmanager
def running(sections: dict[str, dict[str, Any]], **environment: str) -> Iterator[Replicas]:
    """`sections` as in a configuration file, without ports. Ends it as Ctrl-C does."""
    http_port, grpc_port = free_ports(2)
    serve = {"model_name": "tiny", "http_port": http_port, "grpc_port": grpc_port, **sections.get("serve", {})}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(sections | {"serve": serve})],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        url, address = f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"
        yield Replicas(process, url, address, started["metrics"])
    finally:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=90) == 0


def ask(url: str, prompt: str | list[int], **options: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "ignore_eos": True, **options}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    response.raise_for_status()
    return response.json()
