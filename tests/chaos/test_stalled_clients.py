"""Clients that stop reading an answer, or sending a request, but keep their connection: they are cut off, and nobody
else notices, least of all those that wait for an answer longer than that."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from tests.chaos.conftest import Row
from tests.chaos.streams import PROMPT, Load, over_grpc
from tests.e2e.bad_input import MODEL
from tests.e2e.endpoint import Endpoint, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CUT_AFTER_S = 2
MAX_TOKENS = 120
KINDS = 6
# Ten megabytes of answer: the kernel takes up to four from HAProxy for a client, and six for HAProxy from a replica.
LONG = {"max_tokens": 480, "ignore_eos": True, "n": 32, "logprobs": 20}
MOST_KEPT_BYTES = 64 << 20
SMALL_WINDOW = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path) -> Iterator[Endpoint]:
    endpoint = start(tiny_model, max_num_seqs=64, RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S=str(CUT_AFTER_S))
    yield endpoint
    endpoint.stop()


def _connect(endpoint: Endpoint) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    url = endpoint.http.base_url
    client.connect((url.host, url.port))
    return client


def _post(body: bytes, length: int) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n"
    return f"{head}\r\n".encode() + body


def _never_reads(endpoint: Endpoint) -> socket.socket:
    client = _connect(endpoint)
    body = json.dumps({"model": MODEL, "prompt": PROMPT, "stream": True, **LONG}).encode()
    client.sendall(_post(body, len(body)))
    return client


def _never_ends_its_request(endpoint: Endpoint) -> socket.socket:
    client = _connect(endpoint)
    client.sendall(_post(b'{"model":', 1000))
    return client


async def _cut(endpoint: Endpoint, client: socket.socket) -> bytes:
    """Waits until HAProxy has closed its side -> what it had sent. The client hears of it only as it reads that."""
    ours, port = client.getsockname()[1], endpoint.http.base_url.port
    connection = [f"0100007F:{port:04X}", f"0100007F:{ours:04X}", "01"]  # ESTABLISHED
    while connection in [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()]:
        await asyncio.sleep(0.2)
    received = b""
    while some := client.recv(1 << 20):
        received += some
    client.close()
    return received


def _resident_bytes(endpoint: Endpoint) -> int:
    (replica,) = endpoint.named("ray::ServeReplica")
    pages = int(Path(f"/proc/{replica}/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("stall", [_never_reads, _never_ends_its_request])
async def test_http(stall: Callable[[Endpoint], socket.socket], endpoint: Endpoint, report: list[Row]) -> None:
    expected = await asyncio.gather(*(over_grpc(endpoint, i, MAX_TOKENS) for i in range(KINDS)))
    before = _resident_bytes(endpoint)
    async with Load(endpoint, expected, MAX_TOKENS) as load:
        client = stall(endpoint)
        began = time.monotonic()
        async with asyncio.timeout(180):  # for the engine to write so much beside the others
            received = await _cut(endpoint, client)
        cut_s = time.monotonic() - began
        grown = _resident_bytes(endpoint) - before
    assert load.failures == []
    assert load.done > 0
    assert b"[DONE]" not in received
    assert grown < MOST_KEPT_BYTES
    endpoint.settled()
    what = "reads its answer" if stall is _never_reads else "ends its request"
    report.append(
        Row(
            fault=f"an HTTP client that never {what}",
            detection_s=[cut_s],
            recovery_s=[],
            leaks=load.failures,
            measured=f"{len(received)} bytes of the answer came; {load.done} requests of others meanwhile; "
            f"the replica grew by {grown / 2**20:.1f} MiB",
        )
    )


async def _ended(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateChunk]) -> grpc.StatusCode:
    with contextlib.suppress(grpc.RpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    return await call.code()


async def test_grpc(endpoint: Endpoint, report: list[Row]) -> None:
    expected = await asyncio.gather(*(over_grpc(endpoint, i, MAX_TOKENS) for i in range(KINDS)))
    before = _resident_bytes(endpoint)
    request = pb.GenerateRequest(model=MODEL, text=PROMPT, sampling=pb.SamplingParams(seed=1, **LONG))
    async with (
        Load(endpoint, expected, MAX_TOKENS) as load,
        grpc.aio.insecure_channel(endpoint.grpc_address, options=SMALL_WINDOW) as channel,
    ):
        call = InferenceStub(channel).GenerateStream(request)
        await call.read()  # and nothing after it
        began = time.monotonic()
        async with asyncio.timeout(180):
            while not call.done():
                await asyncio.sleep(0.1)
        cut_s = time.monotonic() - began
        grown = _resident_bytes(endpoint) - before
        code = await _ended(call)
    assert code is not grpc.StatusCode.OK
    assert load.failures == []
    assert grown < MOST_KEPT_BYTES
    endpoint.settled()
    report.append(
        Row(
            fault="a gRPC client that never reads its answer",
            detection_s=[cut_s],
            recovery_s=[],
            leaks=load.failures,
            measured=f"told {code.name}; {load.done} requests of others meanwhile; the replica grew by "
            f"{grown / 2**20:.1f} MiB",
        )
    )


async def test_who_waits_for_an_answer_is_not_cut(endpoint: Endpoint) -> None:
    """Answers that are sent whole, so that for long nothing passes on the connection."""
    waits = {"max_tokens": 480, "ignore_eos": True, "n": 32}
    request = pb.GenerateRequest(model=MODEL, text=PROMPT, sampling=pb.SamplingParams(seed=1, **waits))
    began = time.monotonic()

    async def timed(answer: Awaitable[Any]) -> tuple[Any, float]:
        return await answer, time.monotonic() - began

    async with (
        grpc.aio.insecure_channel(endpoint.grpc_address) as channel,
        httpx.AsyncClient(base_url=endpoint.http.base_url, timeout=180) as http,
    ):
        body = {"model": MODEL, "prompt": PROMPT, "seed": 1, **waits}
        over_grpc, over_http = InferenceStub(channel).Generate(request), http.post("/v1/completions", json=body)
        (generated, grpc_s), (response, http_s) = await asyncio.gather(timed(over_grpc), timed(over_http))
    assert len(generated.outputs) == len(response.json()["choices"]) == waits["n"]
    assert min(grpc_s, http_s) > 2 * CUT_AFTER_S, "nobody waited that long"
