"""How the requests of `rayllm bench serve` travel: HTTP, gRPC, or not at all (the engine in this process)."""

import contextlib
import uuid
from typing import Any

import httpx

from rayllm.cli import http_api
from rayllm.cli.bench.load import Record, Transport
from rayllm.core.config import EngineConfig
from rayllm.core.errors import ConfigError
from rayllm.core.types import Request, SamplingParams


async def connect(url: str) -> Transport:
    """Raises ConfigError for a scheme that is not known, EngineUnavailableError if nobody answers."""
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        return await HttpTransport.connect(url.rstrip("/"))
    if scheme == "grpc":
        return GrpcTransport(url)
    raise ConfigError(f"--url: {url!r} begins with none of http://, https://, grpc://")


class HttpTransport:
    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    @classmethod
    async def connect(cls, url: str) -> "HttpTransport":
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(10.0, read=None), limits=limits)
        try:
            response = await client.get("/v1/models")
        except httpx.HTTPError as error:
            await client.aclose()
            raise http_api.unreachable(url, error) from None
        return cls(client, http_api.first_model(response))

    async def send(self, prompt_token_ids: list[int], output_len: int, record: Record) -> None:
        body = {
            "model": self._model,
            "prompt": prompt_token_ids,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code >= 400:
                    http_api.check_status(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if (event := http_api.parse_event(line)) is not None:
                        record.piece(sum(len(choice["token_ids"]) for choice in event["choices"]))
        except httpx.HTTPError as error:
            raise http_api.unreachable(str(self._client.base_url), error) from None

    async def close(self) -> None:
        await self._client.aclose()


class GrpcTransport:
    def __init__(self, url: str) -> None:
        from rayllm.client import AsyncClient

        self._client = AsyncClient(url, retry_for_s=0.0)  # a failure is a result

    async def send(self, prompt_token_ids: list[int], output_len: int, record: Record) -> None:
        async with contextlib.aclosing(self._client.stream(prompt_token_ids, _params(output_len))) as chunks:
            async for chunk in chunks:
                record.piece(len(chunk.token_ids))

    async def close(self) -> None:
        await self._client.close()


class EngineTransport:
    """The bare engine: what a server adds is the difference to this."""

    def __init__(self, config: EngineConfig) -> None:
        from rayllm.cli.local import open_async_engine

        self._engine = open_async_engine(config)

    async def send(self, prompt_token_ids: list[int], output_len: int, record: Record) -> None:
        request = Request(
            request_id=uuid.uuid4().hex, prompt_token_ids=tuple(prompt_token_ids), params=_params(output_len)
        )
        stream: Any = self._engine.generate(request)
        async with contextlib.aclosing(stream) as deltas:
            async for delta in deltas:
                record.piece(len(delta.token_ids))

    async def close(self) -> None:
        await self._engine.close()


def _params(output_len: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
