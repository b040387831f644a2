"""Ten times as many requests as an endpoint can answer, for half a minute: what it takes it answers nearly as fast as
before, the rest it refuses at once, and it does not grow."""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import grpc
import httpx
import pytest

from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from tests.chaos.conftest import Row
from tests.chaos.streams import PROMPT
from tests.e2e.bad_input import MODEL
from tests.e2e.endpoint import Endpoint, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLACES = 8
WAITING = 2  # who is taken last waits for a quarter of an answer's time
MAX_TOKENS = 200
BEFORE_S, BURST_S, TIMES = 8.0, 30.0, 10
MOST_GROWTH_BYTES = 32 << 20


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path) -> Iterator[Endpoint]:
    endpoint = start(tiny_model, max_num_seqs=PLACES, max_waiting=WAITING)
    yield endpoint
    endpoint.stop()


@dataclass
class Clients:
    """One connection of each face; requests of both in turn."""

    http: httpx.AsyncClient
    stub: InferenceStub
    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)

    async def ask(self, number: int) -> None:
        """To the end of the answer, or of the refusal. Raises whatever is neither."""
        began = time.monotonic()
        taken = await (self._over_http() if number % 2 else self._over_grpc())
        (self.accepted_s if taken else self.refused_s).append(time.monotonic() - began)

    async def _over_http(self) -> bool:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "ignore_eos": True}
        response = await self.http.post("/v1/completions", json=body)
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            return False
        response.raise_for_status()
        assert response.json()["usage"]["completion_tokens"] == MAX_TOKENS
        return True

    async def _over_grpc(self) -> bool:
        sampling = pb.SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
        answer: Awaitable[pb.GenerateResponse] = self.stub.Generate(
            pb.GenerateRequest(model=MODEL, text=PROMPT, sampling=sampling)
        )
        try:
            (output,) = (await answer).outputs
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return False
            raise
        assert len(output.token_ids) == MAX_TOKENS
        return True


def resident_bytes(endpoint: Endpoint) -> dict[str, int]:
    """Of each process that a request passes through."""
    sizes = {}
    for title in ("ray::ServeReplica", "bin/haproxy", "ray::HAProxyManager"):
        (pid,) = endpoint.named(title)
        sizes[title] = 4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return sizes


async def test_ten_times_the_load(endpoint: Endpoint, report: list[Row]) -> None:
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=endpoint.http.base_url, timeout=None, limits=limits) as http,
        grpc.aio.insecure_channel(endpoint.grpc_address) as channel,
    ):
        stub = InferenceStub(channel)
        before = Clients(http, stub)
        began = time.monotonic()

        async def one_after_another(client: int) -> None:
            while time.monotonic() - began < BEFORE_S:
                await before.ask(client)

        await asyncio.gather(*(one_after_another(client) for client in range(PLACES)))
        rate = len(before.accepted_s) / (time.monotonic() - began)
        assert not before.refused_s
        sizes = await asyncio.to_thread(resident_bytes, endpoint)

        burst, asked = Clients(http, stub), []
        gc.collect()
        gc.freeze()  # what stops the load generator would else be taken for the endpoint's
        probe = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.refusals"),
            *(http.base_url.host, str(http.base_url.port), str(BURST_S - 2)),
            stdout=asyncio.subprocess.PIPE,
        )
        began = time.monotonic()
        for number in range(round(TIMES * rate * BURST_S)):
            await asyncio.sleep(max(0.0, began + number / (TIMES * rate) - time.monotonic()))
            asked.append(asyncio.create_task(burst.ask(number)))
        await asyncio.gather(*asked)
        gc.unfreeze()
        told, _ = await probe.communicate()
        seen_beside = json.loads(told)
        grown = {
            title: size - sizes[title] for title, size in (await asyncio.to_thread(resident_bytes, endpoint)).items()
        }
    assert len(burst.accepted_s) + len(burst.refused_s) == len(asked)
    assert len(burst.refused_s) > len(burst.accepted_s) > PLACES
    assert len(seen_beside) > 100
    assert max(grown.values()) < MOST_GROWTH_BYTES, grown
    endpoint.settled()
    report.append(
        Row(
            fault=f"{TIMES} times the load for {BURST_S:.0f} s",
            detection_s=seen_beside,
            recovery_s=[],
            leaks=[],
            measured=f"{len(burst.accepted_s)} answered in {median(burst.accepted_s):.2f} s (p50; before the burst "
            f"{median(before.accepted_s):.2f}), {len(burst.refused_s)} refused, which the load generator saw after "
            f"{quantiles(burst.refused_s, n=100)[-1]:.3f} s (99 of 100) and {max(burst.refused_s):.3f} (all); "
            f"the most that a process grew: {max(grown.values()) / 2**20:.1f} MiB",
        )
    )
