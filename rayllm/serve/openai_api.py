"""The HTTP face: OpenAI's routes and a few beside them, translated to and from `InferenceService`.

Bodies are read up to a bound and parsed here rather than by FastAPI, so that each refusal is OpenAI's error object and
names its field. Every answer is written by `Reply`, which watches for the client to go away.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rayllm.core.errors import RayLLMError
from rayllm.serve.admin_api import AdminFace, PromoteRequest
from rayllm.serve.errors import MethodError, RouteError
from rayllm.serve.http_reply import JSON, Reply
from rayllm.serve.openai_response import ChoiceOptions, ResponseWriter, chat_layout, completion_layout
from rayllm.serve.openai_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from rayllm.serve.prompts import Chat
from rayllm.serve.service import GenerateCall, Generation, InferenceService, checked_session

SESSION_HEADER = "x-session-id"

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_http_app(
    service: InferenceService, lifespan: Lifespan | None = None, admin: AdminFace | None = None
) -> FastAPI:
    """`admin`: the routes that change the weights, where there is an endpoint to change them for."""
    app = FastAPI(title="rayllm", docs_url=None, redoc_url=None, lifespan=lifespan)
    face = _HttpFace(service)

    def get(path: str, handler: Callable[..., Awaitable[Response]]) -> None:
        app.add_api_route(path, handler, methods=["GET"], response_class=Response)

    def post(path: str, handler: Callable[..., Awaitable[Response]], schema: str) -> None:
        body = {"content": {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}, "required": True}
        app.add_api_route(path, handler, methods=["POST"], response_class=Response, openapi_extra={"requestBody": body})

    get("/v1/models", face.models)
    get("/v1/models/{model:path}", face.model)
    post("/v1/completions", face.completions, "CompletionRequest")
    post("/v1/chat/completions", face.chat_completions, "ChatCompletionRequest")
    post("/tokenize", face.tokenize, "TokenizeRequest")
    post("/detokenize", face.detokenize, "DetokenizeRequest")
    get("/health", face.health)
    get("/metrics", face.metrics)
    if admin is not None:
        get("/admin/weights", admin.weights)
        post("/admin/promote", admin.promote, "PromoteRequest")
        app.add_api_route("/admin/rollback", admin.rollback, methods=["POST"], response_class=Response)
    app.add_exception_handler(HTTPException, face.refuse_route)
    _describe_bodies(app)
    return app


class _HttpFace:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def models(self) -> Response:
        return self._json({"object": "list", "data": [self._model_object()]})

    async def model(self, model: str) -> Response:
        async def work(reply: Reply) -> None:
            self._service.check_model(model)
            await reply.send_json(msgspec.json.encode(self._model_object()))

        return self._reply(work)

    async def completions(self) -> Response:
        async def work(reply: Reply) -> None:
            wire = parse(CompletionRequest, await reply.read_body())
            generation = await self._service.prepare(_in_session(wire.call(), reply))
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
        async def work(reply: Reply) -> None:
            wire = parse(ChatCompletionRequest, await reply.read_body())
            generation = await self._service.prepare(_in_session(wire.call(), reply))
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
        async def work(reply: Reply) -> None:
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
        async def work(reply: Reply) -> None:
            wire = parse(DetokenizeRequest, await reply.read_body())
            if wire.model is not None:
                self._service.check_model(wire.model)
            text = self._service.prompts.decode(wire.tokens, field="tokens")
            await reply.send_json(msgspec.json.encode({"prompt": text}))

        return self._reply(work)

    async def health(self) -> Response:
        async def work(reply: Reply) -> None:
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

        async def work(reply: Reply) -> None:
            raise refusal

        return self._reply(work, dict(error.headers or {}))

    async def _answer(self, reply: Reply, generation: Generation, writer: ResponseWriter, *, stream: bool) -> None:
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

    def _reply(self, work: Callable[[Reply], Awaitable[None]], headers: Mapping[str, str] | None = None) -> Reply:
        return Reply(work, weight_version=self._service.weight_version, headers=headers or {})

    def _json(self, value: Any) -> Response:
        async def work(reply: Reply) -> None:
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


def _in_session(call: GenerateCall, reply: Reply) -> GenerateCall:
    """The header is Ray Serve's; a body's `prompt_cache_key` goes before it."""
    session = reply.header(SESSION_HEADER)
    if call.session is not None or not session:
        return call
    return replace(call, session=checked_session(SESSION_HEADER, session))


def _describe_bodies(app: FastAPI) -> None:
    """FastAPI does not parse the bodies, so their schemas are put into its description by hand."""
    models = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest, PromoteRequest)
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    description = app.openapi()
    description.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
