"""An endpoint as users start it: a process with its own Ray, Serve and HAProxy."""

import os
import signal
import socket
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
from tests.ray.faults import shard_pids

SCRIPT = """
import contextlib
import signal
import sys
import threading
from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.serve.config import ServeConfig
from rayllm.serve.local import serve_local

engine = EngineConfig(
    model=ModelConfig(model=sys.argv[1]),
    parallel=ParallelConfig(tensor=int(sys.argv[4]), shard_recovery_timeout_s=float(sys.argv[5])),
    cache=CacheConfig(num_blocks=200),
    scheduler=SchedulerConfig(max_num_seqs=4, max_waiting_requests=4),
)
config = ServeConfig(engine=engine, model_name="tiny", http_port=int(sys.argv[2]), grpc_port=int(sys.argv[3]))
with serve_local(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background with SIGINT ignored
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
"""


@dataclass
class Endpoint:
    process: subprocess.Popen[str]
    mark: str
    http: httpx.Client
    channel: grpc.Channel

    @property
    def stub(self) -> InferenceStub:
        return InferenceStub(self.channel)

    def load(self) -> pb.LoadResponse:
        return self.stub.Load(pb.LoadRequest())

    def shards(self) -> set[int]:
        return shard_pids(self.process.pid)

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


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(model: Path, *, tensor: int = 1, shard_recovery_timeout_s: float = 120) -> Endpoint:
    http_port, grpc_port = free_ports(2)
    mark = uuid.uuid4().hex
    arguments = (model, http_port, grpc_port, tensor, shard_recovery_timeout_s)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"SERVE_TEST_MARK": mark},
    )
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    http = httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=60)
    return Endpoint(process, mark, http, grpc.insecure_channel(f"127.0.0.1:{grpc_port}"))


def processes(mark: str) -> list[str]:
    """The command lines of what still runs of an endpoint."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (directory / "environ").read_bytes():
                found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
