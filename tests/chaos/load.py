"""Requests to an endpoint, half over HTTP and half over gRPC, from a process of their own.

    python -m tests.chaos.load URL ADDRESS clients N SECONDS    each client asks as soon as it is answered
    python -m tests.chaos.load URL ADDRESS rate R SECONDS       R requests a second, whatever becomes of them

Prints a JSON object: the seconds of each request that was answered and of each that was refused, and for how long
clients asked: to their last answer, or at a rate to the last request.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass, field

import grpc
import httpx

from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from tests.chaos.streams import PROMPT
from tests.e2e.bad_input import MODEL

MAX_TOKENS = 200


@dataclass
class Seen:
    """How long each answer and each refusal took, and `seconds` for which clients asked."""

    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return len(self.answered_s) + len(self.refused_s)


@dataclass
class Clients:
    """One connection of each face; requests of both in turn."""

    http: httpx.AsyncClient
    stub: InferenceStub
    seen: Seen = field(default_factory=Seen)

    async def ask(self, number: int) -> None:
        """To the end of the answer, or of the refusal. Raises whatever is neither."""
        began = time.monotonic()
        answered = await (self._over_http() if number % 2 else self._over_grpc())
        (self.seen.answered_s if answered else self.seen.refused_s).append(time.monotonic() - began)

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

    async def one_after_another(self, count: int, seconds: float) -> None:
        async def client(number: int) -> None:
            while time.monotonic() - began < seconds:
                await self.ask(number)

        began = time.monotonic()
        await asyncio.gather(*(client(number) for number in range(count)))
        self.seen.seconds = time.monotonic() - began

    async def at_a_rate(self, rate: float, seconds: float) -> None:
        """`rate`: requests a second."""
        began, asked = time.monotonic(), []
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            asked.append(asyncio.create_task(self.ask(number)))
        self.seen.seconds = time.monotonic() - began
        await asyncio.gather(*asked)


async def main(url: str, address: str, how: str, many: str, seconds: str) -> None:
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http,
        grpc.aio.insecure_channel(address) as channel,
    ):
        clients = Clients(http, InferenceStub(channel))
        gc.freeze()  # what stops this process would be taken for the endpoint's
        if how == "clients":
            await clients.one_after_another(int(many), float(seconds))
        else:
            await clients.at_a_rate(float(many), float(seconds))
    print(json.dumps(asdict(clients.seen)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
