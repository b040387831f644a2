"""An endpoint as users start it: a process with its own Ray, Serve and HAProxy."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx

from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from tests.ports import free_ports
from tests.ray.faults import shard_pids
from tests.ray.processes import descendants

SCRIPT = """
import contextlib
import json
import signal
import sys
import threading
from dataclasses import replace
from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.serve.config import ServeConfig
from rayllm.serve.local import serve_local

engine = EngineConfig(
    model=ModelConfig(model=sys.argv[1]),
    parallel=ParallelConfig(tensor=int(sys.argv[4]), shard_recovery_timeout_s=float(sys.argv[5])),
    cache=CacheConfig(num_blocks=200),
    scheduler=SchedulerConfig(max_num_seqs=int(sys.argv[7]), max_waiting_requests=int(sys.argv[8])),
)
config = ServeConfig(
    engine=engine,
    model_name="tiny",
    http_port=int(sys.argv[2]),
    grpc_port=int(sys.argv[3]),
    num_replicas=int(sys.argv[6]),
)
with serve_local(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background with SIGINT ignored
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:  # settings to deploy anew with
            import ray
            from ray import serve
            from ray.serve._private.common import DeploymentID
            from ray.serve.context import _get_global_client
            from rayllm.serve.app import APP_NAME, build_app
            settings = json.loads(line)
            if replicas := settings.pop("scale_to", None):  # as an autoscaler does
                deployment = DeploymentID(name="inference", app_name=APP_NAME)
                ray.get(_get_global_client()._controller.update_deployment_replicas.remote(deployment, replicas))
            else:
                app = build_app(replace(config, **settings))
                serve.run(app, name=APP_NAME, external_scaler_enabled=True)
            print("deployed", flush=True)
        threading.Event().wait()
"""


@dataclass
class Endpoint:
    process: subprocess.Popen[str]
    mark: str
    http: httpx.Client
    channel: grpc.Channel
    grpc_address: str

    @property
    def stub(self) -> InferenceStub:
        return InferenceStub(self.channel)

    def load(self) -> pb.LoadResponse:
        return self.stub.Load(pb.LoadRequest())

    def shards(self) -> set[int]:
        return shard_pids(self.process.pid)

    def deploy(self, **settings: object) -> None:
        """Returns when Serve says that all replicas have the settings and none is left of those before."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) != "deployed\n":  # Serve prints as it waits
            assert line, "the endpoint has ended"

    def named(self, title: str) -> list[int]:
        """The processes of the endpoint whose command line holds `title`, oldest first."""
        found = []
        for pid in sorted(descendants(self.process.pid)):
            with contextlib.suppress(OSError):
                if title in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    def stop(self) -> None:
        """As Ctrl-C does."""
        self.http.close()
        self.channel.close()
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(timeout=60) == 0

    def settled(self, within_s: float = 2.0) -> None:
        give_up = time.monotonic() + within_s
        while (load := self.load()).running or load.waiting or load.free_blocks != load.total_blocks:
            assert time.monotonic() < give_up, load
            time.sleep(0.005)


def start(
    model: Path,
    *,
    tensor: int = 1,
    shard_recovery_timeout_s: float = 120,
    replicas: int = 1,
    max_num_seqs: int = 4,
    max_waiting: int | None = None,
    **environment: str,
) -> Endpoint:
    """`max_waiting` None: as many as run."""
    http_port, grpc_port = free_ports(2)
    mark, waiting = uuid.uuid4().hex, max_waiting or max_num_seqs
    arguments = (model, http_port, grpc_port, tensor, shard_recovery_timeout_s, replicas, max_num_seqs, waiting)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environment | {"SERVE_TEST_MARK": mark},
    )
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    http = httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=60)
    address = f"127.0.0.1:{grpc_port}"
    return Endpoint(process, mark, http, grpc.insecure_channel(address), address)


def processes(mark: str) -> list[str]:
    """The command lines of what still runs of an endpoint."""
    return [*marked(mark).values()]


def marked(mark: str) -> dict[int, str]:
    """The processes of an endpoint and of its Ray instance, by id, with their command lines."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (directory / "environ").read_bytes():
                found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found
