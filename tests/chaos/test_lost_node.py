"""A whole node is lost, with the replica on it: the other one goes on, and a new node gets a new one."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from tests.chaos.conftest import Row
from tests.chaos.streams import over_grpc, over_http
from tests.e2e.endpoint import Endpoint
from tests.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MAX_TOKENS = 300
KINDS = 8
SERVING_S = 90.0

# Three nodes on one machine: the head, which computes nothing and has the one proxy, and two with room for a replica
# each. Their processes read what Serve reads from the environment, so it is set before any of them starts.
SCRIPT = """
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import ray
from ray import serve
from ray.cluster_utils import Cluster
from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.serve import local
from rayllm.serve.config import ServeConfig

http_port, grpc_port = int(sys.argv[2]), int(sys.argv[3])
config = ServeConfig(
    engine=EngineConfig(model=ModelConfig(model=sys.argv[1]), cache=CacheConfig(num_blocks=200)),
    model_name="tiny", http_port=http_port, grpc_port=grpc_port, num_replicas=2,
)
size = {"object_store_memory": 80 << 20}
with local._grpc_block() as ports, tempfile.TemporaryDirectory() as directory:
    os.environ.update(local._environment(Path(directory), config, ports, "key"))
    from rayllm.serve.app import APP_NAME, build_app, grpc_options, http_options
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
    nodes = [cluster.add_node(num_cpus=2, **size) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False)
    options = http_options(config)
    options.location = "HeadOnly"
    serve.start(http_options=options, grpc_options=grpc_options(config))
    serve.run(build_app(config), name=APP_NAME)
    local._await_answers(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}")
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            if line == "lose\\n":
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            else:
                nodes.append(cluster.add_node(num_cpus=2, **size))
            print("done", flush=True)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
"""


class Nodes(Endpoint):
    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) != "done\n":
            assert line, "the endpoint has ended"

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.http.close()
        self.channel.close()
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture
def endpoint(tiny_model: Path) -> Iterator[Nodes]:
    http_port, grpc_port = free_ports(2)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_model), str(http_port), str(grpc_port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        assert line, "the endpoint did not start"
    address = f"127.0.0.1:{grpc_port}"
    http = httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=60)
    endpoint = Nodes(process, "", http, grpc.insecure_channel(address), address)
    yield endpoint
    endpoint.stop()


async def over_plain_http(endpoint: Endpoint, i: int) -> str:
    """-> the text, or how it ended without a client that tries again."""
    try:
        return await over_http(endpoint, i, MAX_TOKENS, stream=False)
    except httpx.HTTPStatusError as error:
        return str(error.response.json()["error"]["code"])
    except httpx.RemoteProtocolError:
        return "cut"


async def two_replicas(endpoint: Endpoint, since: float) -> float:
    while len(await asyncio.to_thread(endpoint.named, "ray::ServeReplica")) < 2 or len(endpoint.shards()) < 2:
        assert time.monotonic() - since < SERVING_S
        await asyncio.sleep(0.1)
    return time.monotonic() - since


async def test_a_lost_node(endpoint: Nodes, report: list[Row]) -> None:
    expected = await asyncio.gather(*(over_grpc(endpoint, i, MAX_TOKENS) for i in range(KINDS)))
    before = endpoint.named("ray::ServeReplica")
    assert len(before) == 2
    streams = [asyncio.create_task(over_grpc(endpoint, i, MAX_TOKENS)) for i in range(KINDS)]
    plain = [asyncio.create_task(over_plain_http(endpoint, i)) for i in range(KINDS)]
    await asyncio.sleep(0.5)
    struck = time.monotonic()
    await asyncio.to_thread(endpoint.tell, "lose")
    assert await over_grpc(endpoint, 0, MAX_TOKENS) == expected[0]
    answered_s = time.monotonic() - struck
    assert await asyncio.gather(*streams) == expected
    for i, answer in enumerate(await asyncio.gather(*plain)):
        assert answer in (expected[i], "unavailable", "cut")
    assert len(set(before) & set(endpoint.named("ray::ServeReplica"))) == 1
    began = time.monotonic()
    await asyncio.to_thread(endpoint.tell, "add")
    whole_s = await two_replicas(endpoint, began)
    assert await asyncio.gather(*(over_grpc(endpoint, i, MAX_TOKENS) for i in range(KINDS))) == expected
    report.append(
        Row(
            fault="a node with one replica of two is lost",
            detection_s=[],
            recovery_s=[answered_s],
            leaks=[],
            measured=f"{KINDS} streams went on with the same text; two replicas {whole_s:.1f} s after a new node",
        )
    )
