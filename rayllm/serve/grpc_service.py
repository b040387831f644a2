"""The gRPC face: `rayllm.v1.Inference` and `grpc.health.v1.Health` over Ray Serve's gRPC.

Serve calls the method of the deployment that has the RPC's name with (request, grpc_context). Requests come as bytes
and are parsed here: Serve's server would answer a malformed message with UNKNOWN and its own exception's text. An error
is a code, a message and trailers set on the context, never an exception: Serve would log each with a traceback,
and drop the trailers.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from rayllm.core.errors import EngineUnavailableError, InvalidRequestError
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.serve import grpc_messages
from rayllm.serve.errors import RouteError, failure
from rayllm.serve.service import InferenceService

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_HEALTH_METHODS = ("Check", "Watch")
_HEALTH_PERIOD_S = 1.0

_Response = TypeVar("_Response", bound=Message)


class GrpcContext(Protocol):
    """What is used of `ray.serve.grpc_util.RayServegRPCContext`."""

    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...


class GrpcServer(Protocol):
    """What is used of `grpc.aio.Server`."""

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence["grpc.GenericRpcHandler[Any, Any]"]) -> None: ...
    def add_registered_method_handlers(self, service_name: str, method_handlers: dict[str, Any]) -> None: ...


class InferenceServicer:
    """The RPCs, as methods for a Serve deployment to inherit."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    @property
    def is_draining(self) -> bool:
        """The server answers what it has, and nothing else is to be sent to it."""
        return False

    async def Generate(self, request: bytes, grpc_context: GrpcContext) -> pb.GenerateResponse:
        async def work() -> pb.GenerateResponse:
            call = grpc_messages.generate_call(grpc_messages.parse(pb.GenerateRequest, request))
            if call.resume is not None:
                raise InvalidRequestError("resume", "is for GenerateStream")
            generation = await self._service.prepare(call)
            builder = grpc_messages.ResponseBuilder(generation)
            async with aclosing(self._service.run(generation)) as deltas:
                async for _, delta in deltas:
                    builder.take(delta)
            return builder.build()

        return await _unary(grpc_context, pb.GenerateResponse, work)

    async def GenerateStream(self, request: bytes, grpc_context: GrpcContext) -> AsyncIterator[pb.GenerateChunk]:
        async with aclosing(self._chunks(request)) as chunks:
            try:
                async for chunk in chunks:
                    yield chunk
            except Exception as error:  # noqa: BLE001 - the edge: see `_unary`
                _refuse(grpc_context, error)

    async def Abort(self, request: bytes, grpc_context: GrpcContext) -> pb.AbortResponse:
        async def work() -> pb.AbortResponse:
            request_id = grpc_messages.parse(pb.AbortRequest, request).request_id
            if not request_id:
                raise InvalidRequestError("request_id", "is missing")
            return pb.AbortResponse(aborted=await self._service.abort(request_id))

        return await _unary(grpc_context, pb.AbortResponse, work)

    async def Tokenize(self, request: bytes, grpc_context: GrpcContext) -> pb.TokenizeResponse:
        async def work() -> pb.TokenizeResponse:
            message = grpc_messages.parse(pb.TokenizeRequest, request)
            self._service.check_model(message.model)
            kind = message.WhichOneof("prompt")
            prompts = self._service.prompts
            if kind == "text":
                special = message.add_special_tokens if message.HasField("add_special_tokens") else True
                token_ids = await prompts.encode_text(message.text, field="text", add_special_tokens=special)
            elif kind == "chat":
                token_ids = await prompts.encode_chat(grpc_messages.chat(message.chat))
            else:
                raise InvalidRequestError("prompt", "is missing: give text or chat")
            return pb.TokenizeResponse(token_ids=token_ids, max_model_len=self._service.limits.max_model_len)

        return await _unary(grpc_context, pb.TokenizeResponse, work)

    async def Detokenize(self, request: bytes, grpc_context: GrpcContext) -> pb.DetokenizeResponse:
        async def work() -> pb.DetokenizeResponse:
            message = grpc_messages.parse(pb.DetokenizeRequest, request)
            self._service.check_model(message.model)
            return pb.DetokenizeResponse(text=self._service.prompts.decode(message.token_ids, field="token_ids"))

        return await _unary(grpc_context, pb.DetokenizeResponse, work)

    async def ModelInfo(self, request: bytes, grpc_context: GrpcContext) -> pb.ModelInfoResponse:
        async def work() -> pb.ModelInfoResponse:
            grpc_messages.parse(pb.ModelInfoRequest, request)
            tokenizer, limits = self._service.tokenizer, self._service.limits
            return pb.ModelInfoResponse(
                model=self._service.model,
                weight_version=self._service.weight_version,
                max_model_len=limits.max_model_len,
                vocab_size=limits.vocab_size,
                eos_token_ids=sorted(tokenizer.eos_token_ids),
                has_chat_template=tokenizer.has_chat_template,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )

        return await _unary(grpc_context, pb.ModelInfoResponse, work)

    async def Load(self, request: bytes, grpc_context: GrpcContext) -> pb.LoadResponse:
        async def work() -> pb.LoadResponse:
            grpc_messages.parse(pb.LoadRequest, request)
            stats = asdict(self._service.stats())  # of which the message has a part
            return pb.LoadResponse(**{field.name: stats[field.name] for field in pb.LoadResponse.DESCRIPTOR.fields})

        return await _unary(grpc_context, pb.LoadResponse, work)

    async def Check(self, request: bytes, grpc_context: GrpcContext) -> health_pb2.HealthCheckResponse:
        async def work() -> health_pb2.HealthCheckResponse:
            service = grpc_messages.parse(health_pb2.HealthCheckRequest, request).service
            if not _is_known(service):
                raise RouteError(f"there is no service {service[:200]!r} here")
            return health_pb2.HealthCheckResponse(status=self._serving_status())

        return await _unary(grpc_context, health_pb2.HealthCheckResponse, work)

    async def Watch(self, request: bytes, grpc_context: GrpcContext) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Sends the status now and whenever it changes. A service that is not here gets SERVICE_UNKNOWN, for the
        protocol wants such a watch to go on. It ends when the server drains, or else the server could not."""
        try:
            service = grpc_messages.parse(health_pb2.HealthCheckRequest, request).service
        except InvalidRequestError as error:
            _refuse(grpc_context, error)
            return
        last = None
        while True:
            known = _is_known(service)
            status = self._serving_status() if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            if self.is_draining:
                return
            await asyncio.sleep(_HEALTH_PERIOD_S)

    async def _chunks(self, request: bytes) -> AsyncGenerator[pb.GenerateChunk, None]:
        call = grpc_messages.generate_call(grpc_messages.parse(pb.GenerateRequest, request))
        generation = await self._service.prepare(call)
        unfinished = len(generation.requests[0].started)
        async with aclosing(self._service.run(generation)) as deltas:
            async for _, delta in deltas:
                chunk = grpc_messages.chunk(generation, delta)
                if delta.finish_reason is not None:
                    unfinished -= 1
                    if not unfinished:
                        chunk.usage.CopyFrom(grpc_messages.usage(generation.usage))
                yield chunk

    def _serving_status(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        if self.is_draining:
            return health_pb2.HealthCheckResponse.NOT_SERVING
        try:
            self._service.check_health()
        except EngineUnavailableError:
            return health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse.SERVING


def add_inference_to_server(servicer: object, server: GrpcServer) -> None:
    """For Serve's `grpc_servicer_functions`, in place of the generated function."""
    _add_to_server(servicer, server, INFERENCE, tuple(INFERENCE.methods_by_name))


def add_health_to_server(servicer: object, server: GrpcServer) -> None:
    _add_to_server(servicer, server, HEALTH, _HEALTH_METHODS)


def _add_to_server(servicer: object, server: GrpcServer, service: ServiceDescriptor, methods: tuple[str, ...]) -> None:
    """As the generated functions do, but without a deserializer: the servicer gets the request's bytes."""
    handlers: dict[str, grpc.RpcMethodHandler[bytes, Any]] = {}
    for name in methods:
        is_stream = service.methods_by_name[name].server_streaming
        kind = grpc.unary_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
        handlers[name] = kind(getattr(servicer, name), response_serializer=_serialize)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    server.add_registered_method_handlers(service.full_name, handlers)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


async def _unary(context: GrpcContext, kind: type[_Response], work: Callable[[], Awaitable[_Response]]) -> _Response:
    try:
        return await work()
    except Exception as error:  # noqa: BLE001 - the edge: a client gets an error of ours, whatever happened
        _refuse(context, error)
        return kind()


def _refuse(context: GrpcContext, error: Exception) -> None:
    told = failure(error)
    context.set_code(told.grpc_status)
    context.set_details(told.message)
    context.set_trailing_metadata(told.grpc_trailers)


def _is_known(service: str) -> bool:
    return service in ("", INFERENCE.full_name, HEALTH.full_name)
