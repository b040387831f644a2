"""Streams of both faces against an endpoint, and what became of each."""

import asyncio
import json
import random
from dataclasses import dataclass, field

import httpx

from rayllm.client import AsyncClient
from rayllm.core.types import SamplingParams
from tests.e2e.bad_input import MODEL
from tests.e2e.endpoint import Endpoint

PROMPT = "a long answer"


def params(i: int, max_tokens: int) -> SamplingParams:
    """Greedy and sampled in turn."""
    return SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=max_tokens, ignore_eos=True)


async def over_grpc(endpoint: Endpoint, i: int, max_tokens: int, *, retry_for_s: float = 60.0) -> str:
    async with AsyncClient(endpoint.grpc_address, retry_for_s=retry_for_s) as client:
        chunks = client.stream(PROMPT, params(i, max_tokens), model=MODEL)
        return "".join([chunk.text async for chunk in chunks])


async def over_http(endpoint: Endpoint, i: int, max_tokens: int, *, stream: bool = True) -> str:
    sampling = params(i, max_tokens)
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    async with httpx.AsyncClient(base_url=endpoint.http.base_url, timeout=120) as http:
        if not stream:
            response = await http.post("/v1/completions", json=body)
            response.raise_for_status()
            return str(response.json()["choices"][0]["text"])
        text, ended = "", False
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        assert ended, "the stream was cut"
        return text


@dataclass
class Load:
    """Streams of both faces, one after another in each of a few tasks, for as long as it is entered.

    gRPC streams are not retried: whatever goes wrong with one is in `failures`.
    """

    endpoint: Endpoint
    expected: list[str]
    max_tokens: int
    tasks: int = 6
    done: int = 0
    failures: list[str] = field(default_factory=list)

    async def __aenter__(self) -> "Load":
        self._stopping = False
        self._running = [asyncio.create_task(self._run(i)) for i in range(self.tasks)]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._running)

    async def _run(self, task: int) -> None:
        rng = random.Random(task)
        while not self._stopping:
            i = rng.randrange(len(self.expected))
            try:
                if task % 3 == 0:
                    text = await over_grpc(self.endpoint, i, self.max_tokens, retry_for_s=0.0)
                else:
                    text = await over_http(self.endpoint, i, self.max_tokens, stream=task % 3 == 1)
                assert text == self.expected[i], "another text"
                self.done += 1
            except Exception as error:  # noqa: BLE001 - each is counted and shown
                self.failures.append(f"{('grpc', 'http stream', 'http')[task % 3]}: {error!r}")
