"""A replica of two is killed under streams: whoever uses the client sees nothing of it, everyone else a typed error.
And replicas that end in order, because of scaling or an update: nobody sees anything of it."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from tests.chaos.conftest import Row
from tests.chaos.streams import PROMPT, Load, over_grpc, over_http
from tests.e2e.bad_input import MODEL
from tests.e2e.endpoint import Endpoint, start

pytestmark = [pytest.mark.ray]

MAX_TOKENS = 120
SERVING_S = 60.0
KINDS = 6


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path) -> Iterator[Endpoint]:
    endpoint = start(tiny_model, replicas=2, max_num_seqs=32)
    yield endpoint
    endpoint.stop()


def both_serve(endpoint: Endpoint) -> None:
    """Two replicas are up, each with its shard."""
    give_up = time.monotonic() + SERVING_S
    while len(endpoint.named("ray::ServeReplica")) < 2 or len(endpoint.shards()) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.1)
    time.sleep(3.0)  # HAProxy hears of it


def expected_texts(endpoint: Endpoint) -> list[str]:
    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(over_grpc(endpoint, i, MAX_TOKENS) for i in range(KINDS)))

    return asyncio.run(all_of_them())


async def raw_grpc(endpoint: Endpoint, method: str) -> tuple[bool, grpc.StatusCode]:
    """-> whether anything had come, and how it ended, without a client that goes on."""
    begun = False
    async with grpc.aio.insecure_channel(endpoint.grpc_address) as channel:
        request = pb.GenerateRequest(
            model=MODEL, text=PROMPT, sampling=pb.SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, seed=3)
        )
        try:
            if method == "Generate":
                await InferenceStub(channel).Generate(request)
            else:
                async for _ in InferenceStub(channel).GenerateStream(request):
                    begun = True
        except grpc.RpcError as error:
            return begun, error.code()
    return True, grpc.StatusCode.OK


async def raw_http(endpoint: Endpoint, *, stream: bool) -> int | str:
    try:
        await over_http(endpoint, 3, MAX_TOKENS, stream=stream)
        return 200
    except httpx.RemoteProtocolError:
        return "cut"
    except httpx.HTTPStatusError as error:
        response = error.response
    assert response.json()["error"]["code"] == "unavailable"
    assert int(response.headers["retry-after"]) >= 1
    return response.status_code


@pytest.mark.slow
async def test_a_killed_replica(endpoint: Endpoint, report: list[Row]) -> None:
    expected = await asyncio.to_thread(expected_texts, endpoint)
    told_s, serving_s = [], []
    for trial in range(2):
        await asyncio.to_thread(both_serve, endpoint)
        resumed = [asyncio.create_task(over_grpc(endpoint, i, MAX_TOKENS)) for i in range(KINDS)]
        streams = [asyncio.create_task(raw_grpc(endpoint, "GenerateStream")) for _ in range(4)]
        unary = [asyncio.create_task(raw_grpc(endpoint, "Generate")) for _ in range(4)]
        whole = [asyncio.create_task(raw_http(endpoint, stream=False)) for _ in range(4)]
        pieces = [asyncio.create_task(raw_http(endpoint, stream=True)) for _ in range(4)]
        await asyncio.sleep(0.3 + 0.2 * trial)
        victim = endpoint.named("ray::ServeReplica")[trial]
        struck = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        failing = [*streams, *unary, *whole, *pieces]
        await asyncio.wait(failing, return_when=asyncio.FIRST_COMPLETED)
        told_s.append(time.monotonic() - struck)

        assert await asyncio.gather(*resumed) == expected
        ends = await asyncio.gather(*streams)
        # HAProxy resets a stream that has begun with CANCEL; nobody but it can say better.
        assert {code for begun, code in ends if begun} <= {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}
        assert {code for begun, code in ends if not begun} <= {grpc.StatusCode.UNAVAILABLE}
        assert {code for _, code in await asyncio.gather(*unary)} <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert set(await asyncio.gather(*whole)) <= {200, 503}
        assert set(await asyncio.gather(*pieces)) <= {200, 503, "cut"}
        assert await over_http(endpoint, 1, MAX_TOKENS) == expected[1]
        while len(endpoint.named("ray::ServeReplica")) < 2 or victim in endpoint.named("ray::ServeReplica"):
            await asyncio.sleep(0.1)
        serving_s.append(time.monotonic() - struck)
    report.append(Row(fault="SIGKILL of one replica of two", detection_s=told_s, recovery_s=serving_s, leaks=[]))


@pytest.mark.slow
async def test_scaling_down_and_a_rolling_update_cut_nothing(endpoint: Endpoint, report: list[Row]) -> None:
    expected = await asyncio.to_thread(expected_texts, endpoint)
    await asyncio.to_thread(both_serve, endpoint)
    async with grpc.aio.insecure_channel(endpoint.grpc_address) as channel:
        watches = [health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()) for _ in range(4)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        took_s = []
        async with Load(endpoint, expected, MAX_TOKENS) as load:
            for settings, replicas, kept in (
                ({"num_replicas": 2, "max_request_s": 3000.0}, 2, 0),
                ({"scale_to": 1}, 1, 1),
                ({"scale_to": 2}, 2, 1),
                ({"scale_to": 1}, 1, 1),
            ):
                before = set(endpoint.named("ray::ServeReplica"))
                began = time.monotonic()
                await asyncio.to_thread(endpoint.deploy, **settings)
                while len(endpoint.named("ray::ServeReplica")) != replicas:
                    await asyncio.sleep(0.1)
                    assert time.monotonic() - began < 60
                took_s.append(time.monotonic() - began)
                assert len(before & set(endpoint.named("ray::ServeReplica"))) == kept, settings
                await asyncio.sleep(3.0)
        assert load.failures == []
        assert load.done > 20
        assert max(took_s) < 45, "an open watch does not hold a drain"
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
    report.append(
        Row(fault="scale-down, rolling update, under load", detection_s=[], recovery_s=took_s, leaks=load.failures)
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
async def test_fifty_scale_downs_cut_nothing(endpoint: Endpoint, report: list[Row]) -> None:
    expected = await asyncio.to_thread(expected_texts, endpoint)
    await asyncio.to_thread(endpoint.deploy, num_replicas=2)  # by whoever scales from outside, from now on
    await asyncio.to_thread(both_serve, endpoint)
    took_s = []
    async with Load(endpoint, expected, MAX_TOKENS) as load:
        for _ in range(50):
            began = time.monotonic()
            await asyncio.to_thread(endpoint.deploy, scale_to=1)
            while len(await asyncio.to_thread(endpoint.named, "ray::ServeReplica")) != 1:
                await asyncio.sleep(0.1)
                assert time.monotonic() - began < 60
            took_s.append(time.monotonic() - began)
            await asyncio.to_thread(endpoint.deploy, scale_to=2)
            await asyncio.to_thread(both_serve, endpoint)
    assert load.failures == []
    assert load.done > 200
    report.append(
        Row(
            fault="50 scale-downs under load",
            detection_s=[],
            recovery_s=took_s,
            leaks=load.failures,
            measured=f"{load.done} requests meanwhile, none failed",
        )
    )
