"""Who answers in `rayllm chat`: a server over HTTP or gRPC, or a model in this process. All stream text."""

import asyncio
import uuid
from collections.abc import Generator
from typing import Any, Protocol

import httpx

from rayllm.cli import http_api
from rayllm.cli.options import SamplingOptions
from rayllm.core.config import EngineConfig
from rayllm.core.errors import ConfigError
from rayllm.core.types import Request, SamplingParams

Messages = list[dict[str, str]]


class ChatBackend(Protocol):
    name: str  # of the model

    def answer(self, messages: Messages) -> Generator[str]:
        """The answer's text in pieces. Closing the iterator stops it, wherever it is made. Raises RayLLMError."""
        ...

    def close(self) -> None: ...


def connect(url: str, options: SamplingOptions) -> ChatBackend:
    """Raises ConfigError for a scheme that is not known, EngineUnavailableError if nobody answers."""
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        return HttpBackend(url.rstrip("/"), options)
    if scheme == "grpc":
        return GrpcBackend(url, options)
    raise ConfigError(f"--url: {url!r} begins with none of http://, https://, grpc://")


class HttpBackend:
    def __init__(self, url: str, options: SamplingOptions) -> None:
        self._url = url
        self._options = options.values()
        self._client = httpx.Client(base_url=url, timeout=httpx.Timeout(10.0, read=None))
        try:
            self.name = http_api.first_model(self._client.get("/v1/models"))
        except httpx.HTTPError as error:
            raise http_api.unreachable(url, error) from None

    def answer(self, messages: Messages) -> Generator[str]:
        given = {name: value for name, value in self._options.items() if value is not None and value != ()}
        body = {"model": self.name, "messages": messages, "stream": True, **given}
        try:
            for event in http_api.stream_events(self._client, "/v1/chat/completions", body):
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
        except httpx.HTTPError as error:
            raise http_api.unreachable(self._url, error) from None

    def close(self) -> None:
        self._client.close()


class GrpcBackend:
    def __init__(self, url: str, options: SamplingOptions) -> None:
        from rayllm.client import Client

        self._client = Client(url)
        self._params = SamplingParams(**options.values())
        self.name = self._client.model_info().model

    def answer(self, messages: Messages) -> Generator[str]:
        for chunk in self._client.stream(messages, self._params):
            yield chunk.text

    def close(self) -> None:
        self._client.close()


class LocalBackend:
    """The engine runs in a thread of its own; the event loop turns only while an answer is being read."""

    def __init__(self, config: EngineConfig, options: SamplingOptions) -> None:
        from rayllm.cli.local import open_async_engine

        self.name = config.model.model
        self._params = SamplingParams(**options.values())
        self._engine = open_async_engine(config)
        self._runner = asyncio.Runner()

    def answer(self, messages: Messages) -> Generator[str]:
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(self._engine.tokenizer.chat(messages)),
            params=self._params,
        )
        pieces: Any = self._engine.generate(request)

        async def next_text() -> str | None:
            delta = await anext(pieces, None)
            return None if delta is None else delta.text

        try:
            while (text := self._runner.run(next_text())) is not None:
                yield text
        finally:
            self._runner.run(pieces.aclose())

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()
