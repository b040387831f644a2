"""Two replicas behind HAProxy, as users start them: like goes to like by either API, and a killed one is survived."""

import asyncio
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rayllm.client import AsyncClient, Client
from rayllm.core.errors import RequestAbortedError
from rayllm.core.types import SamplingParams
from tests.e2e.endpoint import Endpoint, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = "tiny"
SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
FIND_S = 30.0


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path) -> Iterator[Endpoint]:
    endpoint = start(tiny_model, replicas=2, max_num_seqs=32)
    yield endpoint
    endpoint.stop()


def metric(endpoint: Endpoint, name: str, **labels: str) -> Counter[str]:
    """A counter's value by replica; the proxy is asked until both have answered."""
    values: Counter[str] = Counter()
    seen: set[str] = set()
    give_up = time.monotonic() + FIND_S
    while len(seen) < 2:
        assert time.monotonic() < give_up, "one of two replicas does not answer"
        text = httpx.get(f"{endpoint.http.base_url}/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        replica = families["rayllm_running"].samples[0].labels["replica"]
        if replica in seen:
            continue
        seen.add(replica)
        for sample in families[name].samples:
            if sample.name.endswith("_total") and labels.items() <= sample.labels.items():
                values[replica] += sample.value
    return values


def http(endpoint: Endpoint, prompt: str, **options: str) -> None:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **options}
    httpx.post(f"{endpoint.http.base_url}/v1/completions", json=body, timeout=60).raise_for_status()


def rpc(endpoint: Endpoint, prompt: str, session_id: str = "") -> None:
    with Client(endpoint.grpc_address) as client:
        client.generate(prompt, SHORT, model=MODEL, session_id=session_id)


def acquainted(endpoint: Endpoint) -> None:
    """Each replica sends on to the other."""
    give_up = time.monotonic() + FIND_S
    while len(+metric(endpoint, "rayllm_routed_requests", target="peer")) < 2:
        assert time.monotonic() < give_up
        for i in range(8):
            http(endpoint, "x", prompt_cache_key=f"{i}")


def answered_by(endpoint: Endpoint, work: Callable[[], None]) -> Counter[str]:
    """Which replicas' engines had prompt tokens of it."""
    before = metric(endpoint, "rayllm_prompt_tokens")
    work()
    return metric(endpoint, "rayllm_prompt_tokens") - before


def test_requests_with_a_common_beginning_meet_at_one_replica(endpoint):
    acquainted(endpoint)
    for _ in range(2):
        document = secrets.token_hex(128)
        http(endpoint, document)
        time.sleep(0.5)
        hits = metric(endpoint, "rayllm_prefix_hit_tokens")

        def ask(document: str = document) -> None:
            for i in range(6):
                http(endpoint, f"{document} http {i}")
                rpc(endpoint, f"{document} grpc {i}")

        by = answered_by(endpoint, ask)
        assert len(by) == 1, by
        assert sum((metric(endpoint, "rayllm_prefix_hit_tokens") - hits).values()) >= 12 * 256
    assert sum(metric(endpoint, "rayllm_routed_requests", reason="prefix", target="peer").values()) >= 4, (
        "the proxy gave some to the other replica, whichever face"
    )


def test_a_session_stays_at_its_replica(endpoint):
    acquainted(endpoint)
    replicas = set()
    for session in map(str, range(8)):

        def ask(session: str = session) -> None:
            for _ in range(2):
                http(endpoint, secrets.token_hex(8), prompt_cache_key=session)
                rpc(endpoint, secrets.token_hex(8), session_id=session)

        by = answered_by(endpoint, ask)
        assert len(by) == 1, (session, by)
        replicas |= set(by)
    assert len(replicas) == 2, "sessions are spread"


def test_without_a_common_beginning_both_replicas_work(endpoint):
    acquainted(endpoint)

    def ask() -> None:
        for _ in range(10):
            http(endpoint, secrets.token_hex(64))
            rpc(endpoint, secrets.token_hex(64))

    by = answered_by(endpoint, ask)
    assert min(by.values()) > 0.2 * sum(by.values()), by


def test_abort_reaches_a_request_wherever_the_proxy_sends_either(endpoint):
    acquainted(endpoint)
    params = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    with Client(endpoint.grpc_address) as client:
        for i in range(12):
            chunks = client.stream(secrets.token_hex(8), params, model=MODEL, request_id=f"{i}", session_id=f"{i}")
            next(chunks)
            assert client.abort(f"{i}")
            with pytest.raises(RequestAbortedError, match=f"request {i} was aborted"):
                list(chunks)
            assert not client.abort(f"{i}")


async def test_a_killed_replica_is_survived(endpoint):
    """Its own clients resume elsewhere; those whose replica had sent their requests to it see nothing at all."""
    await asyncio.to_thread(acquainted, endpoint)
    params = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    async with AsyncClient(endpoint.grpc_address) as client:
        expected = (await client.generate("a long answer", params, model=MODEL)).outputs[0].text

        async def stream(i: int) -> str:
            async with AsyncClient(endpoint.grpc_address) as mine:
                chunks = mine.stream("a long answer", params, model=MODEL, session_id=f"{i}")
                return "".join([chunk.text async for chunk in chunks])

        async def over_http(i: int) -> str | None:
            """None: its own replica was the one that was killed."""
            body = {"model": MODEL, "prompt": "a long answer", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
            try:
                async with httpx.AsyncClient(base_url=endpoint.http.base_url, timeout=60) as mine:
                    response = await mine.post("/v1/completions", json=body | {"prompt_cache_key": f"{i}"})
            except httpx.RemoteProtocolError:
                return None
            assert response.status_code in (200, 503), response.text
            return response.json()["choices"][0]["text"] if response.status_code == 200 else None

        tasks = [asyncio.create_task(stream(i)) for i in range(12)]
        whole = [asyncio.create_task(over_http(i)) for i in range(12)]
        await asyncio.sleep(0.25)
        victim = endpoint.named("ray::ServeReplica")[0]
        os.kill(victim, signal.SIGKILL)
        assert await asyncio.gather(*tasks) == [expected] * 12
        answers = await asyncio.gather(*whole)
        assert set(answers) <= {expected, None}
        assert answers.count(expected) >= 3
    await asyncio.to_thread(_replaced, endpoint, victim)
    await asyncio.to_thread(acquainted, endpoint)


def _replaced(endpoint: Endpoint, victim: int) -> None:
    give_up = time.monotonic() + 90
    while len(alive := endpoint.named("ray::ServeReplica")) < 2 or victim in alive:
        assert time.monotonic() < give_up
        time.sleep(0.2)
