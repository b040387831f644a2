"""The HTTP face: OpenAI's routes and a few beside them, translated to and from `InferenceService`.

Bodies are read up to a bound and parsed here rather than by FastAPI, so that each refusal is OpenAI's error object and
names its field. Every answer is written by `_Reply`, which watches for the client to go away.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from rayllm.core.errors import RayLLMError
from rayllm.serve.errors import MethodError, PayloadTooLargeError, RouteError, failure
from rayllm.serve.openai_response import (
    DONE,
    ChoiceOptions,
    ResponseWriter,
    chat_layout,
    completion_layout,
    event,
)
from rayllm.serve.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from rayllm.serve.prompts import Chat
from rayllm.serve.service import Generation, InferenceService

MAX_BODY_BYTES = 16 << 20

_JSON = "application/json"

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_http_app(service: InferenceService, lifespan: Lifespan | None = None) -> FastAPI:
    app = FastAPI(title="rayllm", docs_url=None, redoc_url=None, lifespan=lifespan)
    face = _HttpFace(service)

    def get(path: str, handler: Callable[..., Awaitable[Response]]) -> None:
        app.add_api_route(path, handler, methods=["GET"], response_class=Response)

    def post(path: str, handler: Callable[..., Awaitable[Response]], schema: str) -> None:
        body = {"content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}, "required": True}
        app.add_api_route(path, handler, methods=["POST"], response_class=Response, openapi_extra={"requestBody": body})

    get("/v1/models", face.models)
    get("/v1/models/{model:path}", face.model)
    post("/v1/completions", face.completions, "CompletionRequest")
    post("/v1/chat/completions", face.chat_completions, "ChatCompletionRequest")
    post("/tokenize", face.tokenize, "TokenizeRequest")
    post("/detokenize", face.detokenize, "DetokenizeRequest")
    get("/health", face.health)
    get("/metrics", face.metrics)
    app.add_exception_handler(HTTPException, face.refuse_route)
    _describe_bodies(app)
    return app


class _HttpFace:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def models(self) -> Response:
        return self._json({"object": "list", "data": [self._model_object()]})

    async def model(self, model: str) -> Response:
        async def work(reply: _Reply) -> None:
            self._service.check_model(model)
            await reply.send_json(msgspec.json.encode(self._model_object()))

        return self._reply(work)

    async def completions(self) -> Response:
        async def work(reply: _Reply) -> None:
            wire = parse(CompletionRequest, await reply.read_body())
            generation = await self._service.prepare(wire.call())
            options = ChoiceOptions(
                logprobs=wire.logprobs is not None,
                token_ids=bool(wire.return_token_ids),
                prompt_logprobs=wire.prompt_logprobs is not None,
                echo=bool(wire.echo),
            )
            writer = ResponseWriter(
                generation,
                completion_layout(self._service.tokenizer, options),
                include_usage=wire.include_usage,
                every_token=options.logprobs or options.token_ids,
                echo=self._prompt_texts(generation) if wire.echo else None,
            )
            await self._answer(reply, generation, writer, stream=bool(wire.stream))

        return self._reply(work)

    async def chat_completions(self) -> Response:
        async def work(reply: _Reply) -> None:
            wire = parse(ChatCompletionRequest, await reply.read_body())
            generation = await self._service.prepare(wire.call())
            options = ChoiceOptions(
                logprobs=bool(wire.logprobs),
                token_ids=bool(wire.return_token_ids),
                prompt_logprobs=wire.prompt_logprobs is not None,
            )
            writer = ResponseWriter(
                generation,
                chat_layout(self._service.tokenizer, options),
                include_usage=wire.include_usage,
                every_token=options.logprobs or options.token_ids,
            )
            await self._answer(reply, generation, writer, stream=bool(wire.stream))

        return self._reply(work)

    async def tokenize(self) -> Response:
        async def work(reply: _Reply) -> None:
            wire = parse(TokenizeRequest, await reply.read_body())
            if wire.model is not None:
                self._service.check_model(wire.model)
            prompts = self._service.prompts
            if wire.prompt is not None:
                tokens = await prompts.encode_text(
                    wire.prompt, field="prompt", add_special_tokens=wire.add_special_tokens
                )
            else:
                messages = wire.messages or []
                tokens = await prompts.encode_chat(Chat(tuple(message.template_fields for message in messages)))
            limit = self._service.limits.max_model_len
            await reply.send_json(msgspec.json.encode({"tokens": tokens, "count": len(tokens), "max_model_len": limit}))

        return self._reply(work)

    async def detokenize(self) -> Response:
        async def work(reply: _Reply) -> None:
            wire = parse(DetokenizeRequest, await reply.read_body())
            if wire.model is not None:
                self._service.check_model(wire.model)
            text = self._service.prompts.decode(wire.tokens, field="tokens")
            await reply.send_json(msgspec.json.encode({"prompt": text}))

        return self._reply(work)

    async def health(self) -> Response:
        async def work(reply: _Reply) -> None:
            self._service.check_health()
            await reply.send_json(b'{"status":"ok"}')

        return self._reply(work)

    async def metrics(self) -> Response:
        metrics = self._service.metrics
        return Response(metrics.render(), media_type=metrics.content_type)

    async def refuse_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path[:200]
        refusal: RayLLMError
        if error.status_code == 405:
            refusal = MethodError(f"{path} does not take {request.method}")
        else:
            refusal = RouteError(f"there is no {path} here")

        async def work(reply: _Reply) -> None:
            raise refusal

        return self._reply(work, dict(error.headers or {}))

    async def _answer(self, reply: "_Reply", generation: Generation, writer: ResponseWriter, *, stream: bool) -> None:
        async def work() -> None:
            async with aclosing(self._service.run(generation)) as deltas:
                if not stream:
                    async for prompt, delta in deltas:
                        writer.take(prompt, delta)
                    reply.weight_version = generation.weight_version
                    await reply.send_json(writer.response())
                    return
                async for prompt, delta in deltas:
                    reply.weight_version = generation.weight_version
                    if (chunk := writer.chunk(prompt, delta)) is not None:
                        await reply.send_event(chunk)
            await reply.send_event(writer.end(), last=True)

        await reply.while_connected(work())

    def _reply(self, work: Callable[["_Reply"], Awaitable[None]], headers: Mapping[str, str] | None = None) -> "_Reply":
        return _Reply(work, weight_version=self._service.weight_version, headers=headers or {})

    def _json(self, value: Any) -> Response:
        async def work(reply: _Reply) -> None:
            await reply.send_json(msgspec.json.encode(value))

        return self._reply(work)

    def _prompt_texts(self, generation: Generation) -> list[str]:
        return [
            prompt if isinstance(prompt, str) else self._service.tokenizer.decode(request.prompt_token_ids)
            for prompt, request in zip(generation.call.prompts, generation.requests, strict=True)
        ]

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._service.model,
            "object": "model",
            "created": self._service.started,
            "owned_by": "rayllm",
            "max_model_len": self._service.limits.max_model_len,
            "bos_token_id": self._service.tokenizer.bos_token_id,
            "eos_token_id": self._service.tokenizer.eos_token_id,
            "system_fingerprint": self._service.weight_version,
        }


class _Reply(Response):
    """Runs `work` once the server is ready for the answer, and turns what it raises into an error for the client:
    a status and OpenAI's error object, or an event of the stream if that has begun.

    `weight_version`: what is said in the header; an answer's own, once it is known."""

    def __init__(
        self, work: Callable[["_Reply"], Awaitable[None]], *, weight_version: str, headers: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.weight_version = weight_version
        self._work = work
        self._extra_headers = headers
        self._streaming = False
        self._receive: Receive
        self._send: Send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._content_length = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            await self._work(self)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - the edge: a client gets an error of ours, whatever happened
            told = failure(error)
            if self._streaming:
                await self.send_event(event(told.openai_body) + DONE, last=True)
            else:
                await self._send_whole(told.http_status, told.openai_body, told.http_headers)

    async def read_body(self) -> bytes:
        """Raises PayloadTooLargeError as soon as that is known, ClientDisconnect when it never ends."""
        if self._content_length.isdigit() and int(self._content_length[:20]) > MAX_BODY_BYTES:
            raise PayloadTooLargeError(f"the body is larger than {MAX_BODY_BYTES} bytes")
        parts: list[bytes] = []
        size = 0
        async for part in _body_parts(self._receive):
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise PayloadTooLargeError(f"the body is larger than {MAX_BODY_BYTES} bytes")
            parts.append(part)
        return b"".join(parts)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, and give it up as soon as the client is gone, whether or not the server cancels this task."""
        working = asyncio.create_task(work)
        listening = asyncio.create_task(_disconnected(self._receive))
        try:
            await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            working.cancel()
            listening.cancel()
            await asyncio.gather(working, listening, return_exceptions=True)

    async def send_json(self, body: bytes) -> None:
        await self._send_whole(200, body, {})

    async def send_event(self, chunk: bytes, *, last: bool = False) -> None:
        if not self._streaming:
            self._streaming = True
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            await self._send(self._start(200, headers))
        await self._send({"type": "http.response.body", "body": chunk, "more_body": not last})

    async def _send_whole(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        headers = {"content-type": _JSON, "content-length": str(len(body)), **headers}
        await self._send(self._start(status, headers))
        await self._send({"type": "http.response.body", "body": body})

    def _start(self, status: int, headers: dict[str, str]) -> Message:
        headers = {**headers, "x-weight-version": self.weight_version, **self._extra_headers}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        return {"type": "http.response.start", "status": status, "headers": pairs}


async def _body_parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _describe_bodies(app: FastAPI) -> None:
    """FastAPI does not parse the bodies, so their schemas are put into its description by hand."""
    models = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    description = app.openapi()
    description.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
