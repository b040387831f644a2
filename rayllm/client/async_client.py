"""`AsyncClient`: the gRPC API for asyncio."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rayllm.client import codec
from rayllm.client.attempts import RETRY_FOR_S, Attempts, GenerateAttempts, StreamAttempts, cut_short
from rayllm.client.channel import CHANNEL_OPTIONS, host_and_port
from rayllm.client.errors import error_from_status
from rayllm.client.types import Chunk, Generation, Load, ModelInfo, Prompt
from rayllm.core.errors import EngineUnavailableError, RayLLMError
from rayllm.core.types import SamplingParams
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1 import inference_pb2_grpc as pb_grpc


class AsyncClient:
    """`Client` with coroutines; to be made and used on one event loop. Cancelling a call ends it on the server."""

    def __init__(
        self, target: str = "localhost:9000", *, timeout_s: float | None = None, retry_for_s: float = RETRY_FOR_S
    ) -> None:
        self._channel = grpc.aio.insecure_channel(host_and_port(target), options=CHANNEL_OPTIONS)
        self._stub: Any = pb_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._timeout_s = timeout_s
        self._retry_for_s = retry_for_s
        self._served_model: str | None = None

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        request_id: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
    ) -> Generation:
        """See `Client.generate`."""
        limit = self._timeout_s if timeout_s is None else timeout_s
        request = codec.generate_request(
            prompt,
            params,
            model=model or await self._model(),
            request_id=request_id,
            timeout_s=limit,
            session_id=session_id,
        )
        attempts = GenerateAttempts(request, timeout_s=limit, retry_for_s=self._retry_for_s)
        while True:
            try:
                message = await self._stub.Generate(attempts.next_request(), timeout=attempts.remaining_s)
                return codec.generation(message, params)
            except grpc.aio.AioRpcError as error:
                failure = _typed(error)
            await asyncio.sleep(attempts.pause_after(failure))

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        request_id: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Chunk]:
        """See `Client.stream`. Use `contextlib.aclosing` where the loop over it may be left early."""
        limit = self._timeout_s if timeout_s is None else timeout_s
        request = codec.generate_request(
            prompt,
            params,
            model=model or await self._model(),
            request_id=request_id,
            timeout_s=limit,
            session_id=session_id,
        )
        attempts = StreamAttempts(request, params, timeout_s=limit, retry_for_s=self._retry_for_s)
        while not attempts.complete:
            failure: RayLLMError = cut_short()
            call = self._stub.GenerateStream(attempts.next_request(), timeout=attempts.remaining_s)
            try:
                async for message in call:
                    yield attempts.take(message)
            except grpc.aio.AioRpcError as error:
                failure = _typed(error)
            finally:
                call.cancel()
            if not attempts.complete:
                await asyncio.sleep(attempts.pause_after(failure))

    async def abort(self, request_id: str) -> bool:
        """See `Client.abort`."""
        response = await _call(self._stub.Abort, pb.AbortRequest(request_id=request_id), self._timeout_s)
        return bool(response.aborted)

    async def tokenize(self, prompt: Prompt, *, model: str | None = None, add_special_tokens: bool = True) -> list[int]:
        """See `Client.tokenize`."""
        request = codec.tokenize_request(
            prompt, model=model or await self._model(), add_special_tokens=add_special_tokens
        )
        return list(
            (await _call(self._stub.Tokenize, request, self._timeout_s, retry_for_s=self._retry_for_s)).token_ids
        )

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        request = codec.detokenize_request(token_ids, model=model or await self._model())
        return str((await _call(self._stub.Detokenize, request, self._timeout_s, retry_for_s=self._retry_for_s)).text)

    async def model_info(self) -> ModelInfo:
        """See `Client.model_info`."""
        return await self._model_info(retry_for_s=0.0)

    async def load(self) -> Load:
        return codec.load(await _call(self._stub.Load, pb.LoadRequest(), self._timeout_s))

    async def check_health(self) -> None:
        """See `Client.check_health`."""
        response = await _call(self._health.Check, health_pb2.HealthCheckRequest(), self._timeout_s)
        if response.status != health_pb2.HealthCheckResponse.SERVING:
            raise EngineUnavailableError("the server is up but does not serve now")

    async def _model_info(self, *, retry_for_s: float) -> ModelInfo:
        request = pb.ModelInfoRequest()
        return codec.model_info(await _call(self._stub.ModelInfo, request, self._timeout_s, retry_for_s=retry_for_s))

    async def _model(self) -> str:
        if self._served_model is None:
            self._served_model = (await self._model_info(retry_for_s=self._retry_for_s)).model
        return self._served_model

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def _call(
    method: Callable[..., Any], request: object, timeout_s: float | None, *, retry_for_s: float = 0.0
) -> Any:
    attempts = Attempts(timeout_s=timeout_s, retry_for_s=retry_for_s)
    while True:
        try:
            return await method(request, timeout=attempts.remaining_s)
        except grpc.aio.AioRpcError as error:
            failure = _typed(error)
        await asyncio.sleep(attempts.pause_after(failure))


def _typed(error: Any) -> RayLLMError:
    return error_from_status(error.code(), error.details() or "", dict(error.trailing_metadata() or ()))
