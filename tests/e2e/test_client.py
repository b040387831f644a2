"""The gRPC client against a real gRPC server in this process, which answers by a script.

What a model says over Serve is tested elsewhere; here it is the client's own work: messages, errors, deadlines,
cancellation.
"""

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rayllm.client import AsyncClient, Chunk, Client, Generation, Load, ModelInfo, Usage
from rayllm.core import errors
from rayllm.core.types import FinishReason, SamplingParams, TokenLogprobs
from rayllm.engine.outputs import CompletionOutput
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1 import inference_pb2_grpc as pb_grpc

Trailers = tuple[tuple[str, str], ...]
WAIT_S = 10.0


class ScriptedServer(pb_grpc.InferenceServicer, health_pb2_grpc.HealthServicer):
    """Keeps the requests it gets. `failure`: how every call ends, after `pieces_before_failure` pieces of a stream."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.time_remaining: list[float | None] = []
        self.failure: tuple[grpc.StatusCode, str, Trailers] | None = None
        self.pieces_before_failure = 0
        self.hangs = False
        self.cancelled = threading.Event()
        self.response = pb.GenerateResponse(model="tiny")
        self.status = health_pb2.HealthCheckResponse.SERVING

    async def _begin(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        self.requests.append(request)
        self.time_remaining.append(context.time_remaining())

    async def _fail(self, context: grpc.aio.ServicerContext) -> None:
        if self.failure is not None:
            status, details, trailers = self.failure
            await context.abort(status, details, trailers)

    async def _hang(self) -> None:
        try:
            await asyncio.sleep(WAIT_S)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        await self._begin(request, context)
        await self._fail(context)
        if self.hangs:
            await self._hang()
        return self.response

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        await self._begin(request, context)
        for i in range(self.pieces_before_failure if self.failure or self.hangs else 2):
            yield pb.GenerateChunk(request_id="r", weight_version="v", text=f"t{i}", token_ids=[i])
        await self._fail(context)
        if self.hangs:
            await self._hang()
        yield pb.GenerateChunk(
            request_id="r",
            weight_version="v",
            text="!",
            token_ids=[7],
            finish_reason=pb.FINISH_REASON_STOP,
            stop_token_id=7,
            usage=pb.Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=1),
        )

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        await self._begin(request, context)
        return pb.AbortResponse(aborted=request.request_id == "live")

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        await self._begin(request, context)
        return pb.TokenizeResponse(token_ids=[1, 2], max_model_len=512)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        await self._begin(request, context)
        return pb.DetokenizeResponse(text="héllo")

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: grpc.aio.ServicerContext) -> pb.ModelInfoResponse:
        return pb.ModelInfoResponse(
            model="tiny",
            weight_version="v",
            max_model_len=512,
            vocab_size=263,
            eos_token_ids=[5],
            has_chat_template=True,
            eos_token_id=0,
        )

    async def Load(self, request: pb.LoadRequest, context: grpc.aio.ServicerContext) -> pb.LoadResponse:
        return pb.LoadResponse(running=1, free_blocks=9, total_blocks=10, last_step_age_s=0.5)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=self.status)


@pytest.fixture
def server() -> Iterator[tuple[ScriptedServer, str]]:
    """In a thread with an event loop of its own, so that the waiting client can be tested as it is used."""
    scripted = ScriptedServer()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        grpc_server = grpc.aio.server()
        pb_grpc.add_InferenceServicer_to_server(scripted, grpc_server)
        health_pb2_grpc.add_HealthServicer_to_server(scripted, grpc_server)
        port = grpc_server.add_insecure_port("127.0.0.1:0")
        await grpc_server.start()
        return grpc_server, port

    grpc_server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(WAIT_S)
    yield scripted, f"127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(grpc_server.stop(None), loop).result(WAIT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    loop.close()


class Waiting:
    """`Client` behind the interface of `AsyncClient`, so that each test says once what both must do."""

    def __init__(self, target: str, **options: Any) -> None:
        self._client = Client(target, **options)

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **options: Any) -> Any:
            return await asyncio.to_thread(getattr(self._client, name), *args, **options)

        return call

    async def stream(self, *args: Any, **options: Any) -> AsyncIterator[Chunk]:
        chunks = self._client.stream(*args, **options)
        try:
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk
        finally:
            chunks.close()

    async def __aenter__(self) -> "Waiting":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._client.close()


@pytest.fixture(params=[Waiting, AsyncClient])
def make_client(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_both_clients_have_the_same_methods():
    def signatures(client: type) -> dict[str, list[Any]]:
        methods = inspect.getmembers(client, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters.values()) for name, method in methods if name[0] != "_"}

    assert signatures(Client) == signatures(AsyncClient)


async def test_an_answer_comes_back_whole(server, make_client):
    scripted, target = server
    scripted.response = pb.GenerateResponse(
        request_id="mine",
        model="tiny",
        weight_version="v1",
        outputs=[
            pb.Completion(
                text="안녕",
                token_ids=[3, 4],
                logprobs=[
                    pb.TokenLogprobs(token_id=3, logprob=-0.5, rank=1, top=[pb.TopLogprob(token_id=3, logprob=-0.5)]),
                    pb.TokenLogprobs(token_id=4, logprob=-2.0, rank=2),
                ],
                finish_reason=pb.FINISH_REASON_STOP,
                stop_string="END",
            ),
            pb.Completion(index=1, finish_reason=pb.FINISH_REASON_LENGTH),
        ],
        usage=pb.Usage(prompt_tokens=2, completion_tokens=2, cached_tokens=0),
        prompt_logprobs=[pb.TokenLogprobs(token_id=9, logprob=-1.0, rank=3)],
    )
    async with make_client(f"grpc://{target}") as client:
        params = SamplingParams(n=2, logprobs=1, prompt_logprobs=0)
        assert await client.generate("hi", params, request_id="mine") == Generation(
            request_id="mine",
            model="tiny",
            weight_version="v1",
            outputs=[
                CompletionOutput(
                    index=0,
                    text="안녕",
                    token_ids=[3, 4],
                    logprobs=[
                        TokenLogprobs(token_id=3, logprob=-0.5, rank=1, top=((3, -0.5),)),
                        TokenLogprobs(token_id=4, logprob=-2.0, rank=2),
                    ],
                    finish_reason=FinishReason.STOP,
                    stop_reason="END",
                ),
                CompletionOutput(
                    index=1, text="", token_ids=[], logprobs=[], finish_reason=FinishReason.LENGTH, stop_reason=None
                ),
            ],
            usage=Usage(prompt=2, completion=2, cached=0),
            prompt_logprobs=[None, TokenLogprobs(token_id=9, logprob=-1.0, rank=3)],
        )
        plain = await client.generate("hi")
        assert plain.outputs[0].logprobs is None
        assert plain.prompt_logprobs is None


async def test_every_sampling_parameter_is_sent(server, make_client):
    scripted, target = server
    params = SamplingParams(
        n=2,
        temperature=0.0,
        top_k=5,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        frequency_penalty=-1.0,
        presence_penalty=1.0,
        logit_bias={3: -1.5},
        seed=-4,
        max_tokens=9,
        min_tokens=1,
        stop=("a", "b"),
        stop_token_ids=(7,),
        ignore_eos=True,
        logprobs=0,
        logprob_token_ids=(4, 1),
        prompt_logprobs=2,
        prompt_logprobs_start=3,
    )
    async with make_client(target) as client:
        answer = await client.generate([5, 6], params, model="other", request_id="r", timeout_s=2.0)
        assert answer.prompt_logprobs is not None
        assert answer.prompt_logprobs[:3] == [None] * 3
        await client.generate([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=None))
        await client.generate("hi")
    sent, chat, plain = scripted.requests
    assert sent == pb.GenerateRequest(
        model="other",
        request_id="r",
        token_ids=pb.TokenIds(ids=[5, 6]),
        sampling=pb.SamplingParams(
            n=2,
            temperature=0.0,
            top_k=5,
            top_p=0.5,
            min_p=0.25,
            repetition_penalty=1.5,
            frequency_penalty=-1.0,
            presence_penalty=1.0,
            logit_bias={3: -1.5},
            seed=-4,
            max_tokens=9,
            min_tokens=1,
            stop=["a", "b"],
            stop_token_ids=[7],
            ignore_eos=True,
            logprobs=0,
            logprob_token_ids=[4, 1],
            prompt_logprobs=2,
            prompt_logprobs_start=3,
        ),
        timeout_ms=2000,
    )
    assert chat.model == "tiny"  # asked of the server when it is not given
    assert chat.chat.messages[0] == pb.Message(role="user", content="hi")
    assert not chat.sampling.HasField("max_tokens")
    assert not plain.HasField("sampling")
    assert not plain.HasField("timeout_ms")


async def test_a_stream_comes_piece_by_piece(server, make_client):
    scripted, target = server
    async with make_client(target) as client:
        chunks = [chunk async for chunk in client.stream("hi", timeout_s=5.0)]
    assert [chunk.text for chunk in chunks] == ["t0", "t1", "!"]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, FinishReason.STOP]
    assert chunks[0].usage is None
    assert chunks[-1].usage == Usage(prompt=3, completion=3, cached=1)
    assert chunks[-1].stop_reason == 7
    assert 4000 < scripted.requests[0].timeout_ms <= 5000
    assert scripted.time_remaining[0] == pytest.approx(5.0, abs=1.0)


async def test_the_small_calls(server, make_client):
    scripted, target = server
    async with make_client(target) as client:
        assert await client.abort("live") is True
        assert await client.abort("gone") is False
        assert await client.tokenize("hi", add_special_tokens=False) == [1, 2]
        assert await client.tokenize([{"role": "user", "content": "hi"}]) == [1, 2]
        assert await client.detokenize([1, 2]) == "héllo"
        assert await client.model_info() == ModelInfo(
            model="tiny",
            weight_version="v",
            max_model_len=512,
            vocab_size=263,
            eos_token_ids=(5,),
            has_chat_template=True,
            bos_token_id=None,
            eos_token_id=0,
        )
        load = await client.load()
        assert isinstance(load, Load)
        assert (load.running, load.free_blocks, load.last_step_age_s) == (1, 9, 0.5)
        await client.check_health()
        scripted.status = health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(errors.EngineUnavailableError, match="does not serve"):
            await client.check_health()
    assert scripted.requests[2].text == "hi"
    assert scripted.requests[2].add_special_tokens is False
    assert scripted.requests[3].chat.messages[0].content == "hi"


STATUSES = [
    (
        grpc.StatusCode.INVALID_ARGUMENT,
        "top_p: 2 is not in (0, 1]",
        (("error-code", "invalid_request"), ("error-field", "top_p")),
        errors.InvalidRequestError("top_p", "2 is not in (0, 1]"),
    ),
    (
        grpc.StatusCode.NOT_FOUND,
        "no such model",
        (("error-code", "model_not_found"),),
        errors.ModelNotFoundError("no such model"),
    ),
    (
        grpc.StatusCode.NOT_FOUND,
        "Application metadata not set",
        (),
        errors.EngineUnavailableError("Application metadata not set", retry_after_s=1.0),
    ),
    (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        (("error-code", "over_capacity"), ("retry-after-ms", "250")),
        errors.CapacityError("the queue is full", retry_after_s=0.25),
    ),
    (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "too many bytes",
        (("error-code", "payload_too_large"),),
        errors.RayLLMError("RESOURCE_EXHAUSTED: too many bytes"),
    ),
    (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "too late",
        (("error-code", "deadline_exceeded"),),
        errors.DeadlineExceededError("too late"),
    ),
    (grpc.StatusCode.CANCELLED, "aborted", (("error-code", "aborted"),), errors.RequestAbortedError("aborted")),
    (
        grpc.StatusCode.ALREADY_EXISTS,
        "in use",
        (("error-code", "request_exists"), ("error-field", "request_id")),
        errors.RequestExistsError("in use"),
    ),
    (
        grpc.StatusCode.UNAVAILABLE,
        "a shard was lost",
        (("error-code", "unavailable"), ("retry-after-ms", "3000")),
        errors.EngineUnavailableError("a shard was lost", retry_after_s=3.0),
    ),
    (
        grpc.StatusCode.INTERNAL,
        "the server failed",
        (("error-code", "internal"),),
        errors.RayLLMError("INTERNAL: the server failed"),
    ),
    # A proxy on the way sends a status alone.
    (grpc.StatusCode.INVALID_ARGUMENT, "bad", (), errors.InvalidRequestError("request", "bad")),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", (), errors.CapacityError("busy", retry_after_s=1.0)),
    (grpc.StatusCode.CANCELLED, "RST_STREAM", (), errors.EngineUnavailableError("RST_STREAM", retry_after_s=1.0)),
    (grpc.StatusCode.UNAUTHENTICATED, "who?", (), errors.RayLLMError("UNAUTHENTICATED: who?")),
]


@pytest.mark.parametrize(
    ("status", "details", "trailers", "expected"),
    STATUSES,
    ids=[f"{s[0].name.lower()}-{s[3].code}-{len(s[2])}" for s in STATUSES],
)
async def test_every_status_is_a_typed_error(server, make_client, status, details, trailers, expected):
    scripted, target = server
    scripted.failure = (status, details, trailers)
    scripted.pieces_before_failure = 1
    async with make_client(target, retry_for_s=0) as client:
        with pytest.raises(errors.RayLLMError) as whole:
            await client.generate("hi")
        chunks = client.stream("hi")
        assert (await anext(chunks)).text == "t0"  # what came before the error counts
        with pytest.raises(errors.RayLLMError) as streamed:
            await anext(chunks)
    for raised in (whole.value, streamed.value):
        assert type(raised) is type(expected)
        assert str(raised) == str(expected)
        assert vars(raised) == vars(expected)


async def test_a_deadline_ends_the_call_on_both_sides(server, make_client):
    scripted, target = server
    scripted.hangs = True
    async with make_client(target, timeout_s=0.2) as client:
        with pytest.raises(errors.DeadlineExceededError):
            await client.generate("hi")
        assert await asyncio.to_thread(scripted.cancelled.wait, WAIT_S)
        scripted.cancelled.clear()
        with pytest.raises(errors.DeadlineExceededError):
            await anext(client.stream("hi"))
        assert await asyncio.to_thread(scripted.cancelled.wait, WAIT_S)
    timeouts_ms = [request.timeout_ms for request in scripted.requests]
    assert len(timeouts_ms) == 2
    assert all(0 < timeout_ms <= 200 for timeout_ms in timeouts_ms)  # what is left of it when the request is sent


async def test_leaving_a_stream_ends_it_on_the_server(server, make_client):
    scripted, target = server
    scripted.hangs = True
    scripted.pieces_before_failure = 1
    async with make_client(target) as client:
        async with contextlib.aclosing(client.stream("hi")) as chunks:
            assert (await anext(chunks)).text == "t0"
        assert await asyncio.to_thread(scripted.cancelled.wait, WAIT_S)


async def test_cancelling_a_task_ends_its_call_on_the_server(server):
    scripted, target = server
    scripted.hangs = True
    async with AsyncClient(target) as client:
        task = asyncio.create_task(client.generate("hi"))
        deadline = time.monotonic() + WAIT_S
        while not scripted.requests and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(scripted.cancelled.wait, WAIT_S)


async def test_nobody_there(make_client):
    async with make_client("127.0.0.1:1", timeout_s=1.0) as client:
        with pytest.raises(errors.EngineUnavailableError):
            await client.model_info()


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("a\ud800", {}, "prompt"),
        ([1, -1], {}, "prompt"),
        ([1, 1 << 31], {}, "prompt"),
        ([1, True], {}, "prompt"),
        (5, {}, "prompt"),
        (b"ab", {}, "prompt"),
        (None, {}, "prompt"),
        ([{"role": "user"}], {}, "messages"),
        ([{"role": "user", "content": "hi", "name": "x"}], {}, "messages"),
        ([{"role": "user", "content": 3}], {}, "messages"),
        ("hi", {"request_id": "\udfff"}, "request_id"),
        ("hi", {"params": SamplingParams(max_tokens=None)}, "max_tokens"),
        ("hi", {"timeout_s": -1.0}, "timeout_s"),
        ("hi", {"timeout_s": float("nan")}, "timeout_s"),
    ],
)
async def test_what_cannot_be_sent_is_refused_by_name(server, make_client, prompt, options, field):
    scripted, target = server
    async with make_client(target) as client:
        with pytest.raises(errors.InvalidRequestError) as refused:
            await client.generate(prompt, model="tiny", **options)
    assert refused.value.field == field
    assert scripted.requests == []
