"""The weights of an endpoint are changed twenty times under load, once to a damaged checkpoint and once while a rank is
killed: no request fails, and each answer is of one version, the one that it names."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from rayllm.cli.http_api import stream_events
from rayllm.client import AsyncClient
from rayllm.core.config import CacheConfig
from rayllm.core.errors import RayLLMError
from rayllm.engine.llm import LLM
from rayllm.models.weight_version import weight_version
from tests.chaos.conftest import Row
from tests.chaos.streams import PROMPT, params
from tests.checkpoints import flip_a_bit, retrained, sealed
from tests.e2e.bad_input import MODEL
from tests.e2e.endpoint import Endpoint, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHANGES = 20
DAMAGED, KILLED = 7, 12  # which of them
KINDS = 6
MAX_TOKENS = 80
KEY = "of the test"

Expected = dict[str, list[str]]


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model(num_key_value_heads=2)  # two ranks divide it


@pytest.fixture(scope="module")
def endpoint(model: Path) -> Iterator[Endpoint]:
    endpoint = start(model, tensor=2, max_num_seqs=16, RAYLLM_ADMIN_KEY=KEY)
    yield endpoint
    endpoint.stop()


def change(endpoint: Endpoint, path: str, **body: object) -> str:
    """-> the version that is served in the end. Raises RayLLMError."""
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=endpoint.http.base_url, headers=headers, timeout=120) as client:
        events = list(stream_events(client, path, body))
    assert events[-1]["event"] == "done"
    return str(events[-1]["weight_version"])


def expected_of(models: list[Path]) -> Expected:
    """What a plain engine answers with the weights of each."""
    expected = {}
    for model in models:
        with LLM(str(model), cache=CacheConfig(num_blocks=200)) as llm:
            outputs = llm.generate([PROMPT] * KINDS, [params(i, MAX_TOKENS) for i in range(KINDS)])
            expected[weight_version(model)] = [output.outputs[0].text for output in outputs]
    return expected


@dataclass
class Answers:
    """Asked for on and on, over both faces, by a few tasks."""

    endpoint: Endpoint
    expected: Expected
    done: int = 0
    failures: list[str] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)  # when a token came, and how long after the last

    async def run(self, task: int, ended: asyncio.Event) -> None:
        rng = random.Random(task)
        while not ended.is_set():
            i = rng.randrange(KINDS)
            try:
                versions, text = await (self._over_grpc(i) if task % 2 else self._over_http(i))
                (version,) = versions
                assert text == self.expected[version][i], f"not the text of {version}"
                self.done += 1
            except Exception as error:  # noqa: BLE001 - each is counted and shown
                self.failures.append(f"{('http', 'grpc')[task % 2]}: {error!r}")

    async def _over_grpc(self, i: int) -> tuple[set[str], str]:
        versions, text, last = set(), "", 0.0
        async with AsyncClient(self.endpoint.grpc_address, retry_for_s=0.0) as client:
            async for chunk in client.stream(PROMPT, params(i, MAX_TOKENS), model=MODEL):
                now = time.monotonic()
                if last:
                    self.pauses.append((now, now - last))
                last = now
                versions.add(chunk.weight_version)
                text += chunk.text
        return versions, text

    async def _over_http(self, i: int) -> tuple[set[str], str]:
        sampling = params(i, MAX_TOKENS)
        body = {
            "model": MODEL,
            "prompt": PROMPT,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        versions, text = set(), ""
        async with (
            httpx.AsyncClient(base_url=self.endpoint.http.base_url, timeout=120) as http,
            http.stream("POST", "/v1/completions", json=body) as response,
        ):
            response.raise_for_status()
            versions.add(response.headers["x-weight-version"])
            lines = [line async for line in response.aiter_lines() if line]
        assert lines.pop() == "data: [DONE]", "the stream was cut"
        for line in lines:
            chunk = json.loads(line.removeprefix("data: "))
            versions.add(chunk["system_fingerprint"])
            text += chunk["choices"][0]["text"]
        return versions, text


async def kill_a_rank(endpoint: Endpoint, rng: random.Random) -> None:
    await asyncio.sleep(rng.uniform(0.0, 0.6))  # it takes about that long for all replicas to have heard and loaded
    os.kill(rng.choice(sorted(endpoint.shards())), signal.SIGKILL)


async def test_twenty_changes(endpoint: Endpoint, model: Path, tmp_path: Path, report: list[Row]) -> None:
    others = [sealed(retrained(model, tmp_path / f"other {seed}", seed)) for seed in (1, 2)]
    damaged = flip_a_bit(sealed(retrained(model, tmp_path / "damaged", 3)))
    expected = await asyncio.to_thread(expected_of, [model, *others])
    rng = random.Random(0)
    answers, ended = Answers(endpoint, expected), asyncio.Event()
    asking = [asyncio.create_task(answers.run(task, ended)) for task in range(6)]
    took_s, spans, before = [], [], weight_version(model)
    for number in range(CHANGES):
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        began = time.monotonic()
        if number == DAMAGED:
            with pytest.raises(RayLLMError, match="is damaged"):
                await asyncio.to_thread(change, endpoint, "/admin/promote", checkpoint=str(damaged))
            continue
        killing = asyncio.create_task(kill_a_rank(endpoint, rng)) if number == KILLED else None
        if number % 2:
            served = await asyncio.to_thread(change, endpoint, "/admin/rollback")
        else:
            target = next(other for other in others[:: rng.choice((1, -1))] if weight_version(other) != before)
            served = await asyncio.to_thread(change, endpoint, "/admin/promote", checkpoint=str(target))
            assert served == weight_version(target)
        assert served != before
        before = served
        if killing is not None:
            await killing
            done = answers.done
            while answers.done < done + 2 * len(asking):  # its shards are back, and the pauses are of changes alone
                await asyncio.sleep(0.1)
        else:
            took_s.append(time.monotonic() - began)
            spans.append((began, time.monotonic()))
    ended.set()
    await asyncio.gather(*asking)
    assert answers.failures == []
    assert answers.done > CHANGES
    endpoint.settled(within_s=10.0)
    during = [pause for at, pause in answers.pauses if any(first <= at <= last + 0.5 for first, last in spans)]
    measured = f"{answers.done} answers, {len(answers.failures)} failed; longest pause {max(during):.2f} s"
    report.append(
        Row(
            fault="promote / rollback under load, one damaged, one with a rank killed",
            detection_s=[],
            recovery_s=took_s,
            leaks=answers.failures,
            measured=measured,
        )
    )
