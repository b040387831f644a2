"""`Client`: the gRPC API for code that waits."""

import time
from collections.abc import Callable, Generator, Sequence
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


class Client:
    """Thread-safe. `timeout_s` bounds every call that is not given its own; None: calls may wait for ever.

    A call that finds no server, or loses it, is made again for up to `retry_for_s` seconds (0: never) within its time;
    a stream then goes on where it was, with the text that it would have had (README, "When a replica is lost").

    Every method raises the errors of `rayllm.core.errors`: InvalidRequestError, ModelNotFoundError, CapacityError,
    DeadlineExceededError, RequestAbortedError, RequestExistsError, EngineUnavailableError, or RayLLMError for what is
    none of these.
    """

    def __init__(
        self, target: str = "localhost:9000", *, timeout_s: float | None = None, retry_for_s: float = RETRY_FOR_S
    ) -> None:
        self._channel = grpc.insecure_channel(host_and_port(target), options=CHANNEL_OPTIONS)
        self._stub: Any = pb_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._timeout_s = timeout_s
        self._retry_for_s = retry_for_s
        self._served_model: str | None = None

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        request_id: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
    ) -> Generation:
        """The whole answer to a text, to token ids or to a conversation. `model` None: the one that is served."""
        limit = self._timeout_s if timeout_s is None else timeout_s
        request = codec.generate_request(
            prompt,
            params,
            model=model or self._model(),
            request_id=request_id,
            timeout_s=limit,
            session_id=session_id,
        )
        attempts = GenerateAttempts(request, timeout_s=limit, retry_for_s=self._retry_for_s)
        while True:
            try:
                message = self._stub.Generate(attempts.next_request(), timeout=attempts.remaining_s)
                return codec.generation(message, params)
            except grpc.RpcError as error:
                failure = _typed(error)
            time.sleep(attempts.pause_after(failure))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        request_id: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
    ) -> Generator[Chunk]:
        """The answer's pieces as they come. Closing the iterator ends the request on the server."""
        limit = self._timeout_s if timeout_s is None else timeout_s
        request = codec.generate_request(
            prompt,
            params,
            model=model or self._model(),
            request_id=request_id,
            timeout_s=limit,
            session_id=session_id,
        )
        attempts = StreamAttempts(request, params, timeout_s=limit, retry_for_s=self._retry_for_s)
        while not attempts.complete:
            failure: RayLLMError = cut_short()
            call = self._stub.GenerateStream(attempts.next_request(), timeout=attempts.remaining_s)
            try:
                for message in call:
                    yield attempts.take(message)
            except grpc.RpcError as error:
                failure = _typed(error)
            finally:
                call.cancel()
            if not attempts.complete:
                time.sleep(attempts.pause_after(failure))

    def abort(self, request_id: str) -> bool:
        """False: no such request is live. Raises EngineUnavailableError also when a replica does not say."""
        response: pb.AbortResponse = _call(self._stub.Abort, pb.AbortRequest(request_id=request_id), self._timeout_s)
        return response.aborted

    def tokenize(self, prompt: Prompt, *, model: str | None = None, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, or of a conversation by the model's chat template."""
        request = codec.tokenize_request(prompt, model=model or self._model(), add_special_tokens=add_special_tokens)
        response: pb.TokenizeResponse = _call(
            self._stub.Tokenize, request, self._timeout_s, retry_for_s=self._retry_for_s
        )
        return list(response.token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        request = codec.detokenize_request(token_ids, model=model or self._model())
        response: pb.DetokenizeResponse = _call(
            self._stub.Detokenize, request, self._timeout_s, retry_for_s=self._retry_for_s
        )
        return response.text

    def model_info(self) -> ModelInfo:
        """Asked once, as are `load`, `abort` and `check_health`: they are about a server that is there."""
        return self._model_info(retry_for_s=0.0)

    def load(self) -> Load:
        return codec.load(_call(self._stub.Load, pb.LoadRequest(), self._timeout_s))

    def check_health(self) -> None:
        """Raises EngineUnavailableError unless the server says that it serves."""
        response = _call(self._health.Check, health_pb2.HealthCheckRequest(), self._timeout_s)
        if response.status != health_pb2.HealthCheckResponse.SERVING:
            raise EngineUnavailableError("the server is up but does not serve now")

    def _model_info(self, *, retry_for_s: float) -> ModelInfo:
        request = pb.ModelInfoRequest()
        return codec.model_info(_call(self._stub.ModelInfo, request, self._timeout_s, retry_for_s=retry_for_s))

    def _model(self) -> str:
        if self._served_model is None:
            self._served_model = self._model_info(retry_for_s=self._retry_for_s).model
        return self._served_model

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _call(method: Callable[..., Any], request: object, timeout_s: float | None, *, retry_for_s: float = 0.0) -> Any:
    attempts = Attempts(timeout_s=timeout_s, retry_for_s=retry_for_s)
    while True:
        try:
            return method(request, timeout=attempts.remaining_s)
        except grpc.RpcError as error:
            failure = _typed(error)
        time.sleep(attempts.pause_after(failure))


def _typed(error: Any) -> RayLLMError:
    # An RpcError is also the Call that failed.
    return error_from_status(error.code(), error.details() or "", dict(error.trailing_metadata() or ()))
