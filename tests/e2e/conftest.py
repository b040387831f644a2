"""Both faces in this process, on real sockets, over a real engine with a tiny model.

What Ray Serve does with the gRPC methods is done here by the few lines of `as_serve_does`, with Serve's own context;
the tests marked `ray` go through Serve itself.
"""

import asyncio
import inspect
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import openai
import pytest_asyncio
import uvicorn
from ray.serve.grpc_util import RayServegRPCContext

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.engine.async_engine import AsyncEngine
from rayllm.models.weight_version import weight_version
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from rayllm.serve.grpc_service import InferenceServicer, add_health_to_server, add_inference_to_server
from rayllm.serve.http_reply import MAX_BODY_BYTES
from rayllm.serve.openai_api import build_http_app
from rayllm.serve.routed_engine import RoutedEngine
from rayllm.serve.service import InferenceService

MODEL = "tiny"


@dataclass
class Server:
    engine: AsyncEngine
    weights: str  # what answers are to say of them
    service: InferenceService
    url: str
    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    grpc_address: str

    @property
    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def grpc(self) -> InferenceStub:
        return InferenceStub(self.channel)

    async def generate(self, method: str, request: pb.GenerateRequest) -> None:
        """Call either method to its end."""
        call = getattr(self.grpc, method)(request)
        if method == "Generate":
            await call
        else:
            async for _ in call:
                pass

    async def settled(self) -> None:
        """Blocks are free within two steps of the last request's end."""
        steps = self.engine.stats().steps
        while (stats := self.engine.stats()).free_blocks != stats.total_blocks:
            assert stats.steps <= steps + 2, "blocks are still held two steps after the last request ended"
            await asyncio.sleep(0.001)
        self.engine.check_integrity()

    async def running(self, count: int = 1) -> None:
        async with asyncio.timeout(30):
            while self.engine.stats().running < count:
                await asyncio.sleep(0.001)


def as_serve_does(servicer: InferenceServicer) -> object:
    class Adapter:
        def __getattr__(self, name: str) -> Callable[..., object]:
            method = getattr(servicer, name)
            if inspect.isasyncgenfunction(method):

                async def stream(request, context):
                    serve_context = RayServegRPCContext(context)
                    async with aclosing(method(request, grpc_context=serve_context)) as messages:
                        async for message in messages:
                            yield message
                    serve_context._set_on_grpc_context(context)

                return stream

            async def unary(request, context):
                serve_context = RayServegRPCContext(context)
                message = await method(request, grpc_context=serve_context)
                serve_context._set_on_grpc_context(context)
                return message

            return unary

    return Adapter()


async def start(engine: AsyncEngine, model: Path, routed: RoutedEngine | None = None) -> AsyncIterator[Server]:
    """`model`: what the engine has loaded; `routed`: the engine among its peers, if it has any."""
    everywhere = None if routed is None else routed.abort_everywhere
    service = InferenceService(routed or engine, model=MODEL, max_request_s=60.0, abort_everywhere=everywhere)
    if routed is not None:
        routed.attach(service)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(build_http_app(service), log_level="critical", lifespan="off")
        http_server = uvicorn.Server(config)
        serving = asyncio.create_task(http_server.serve([listener]))
        grpc_server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_BODY_BYTES)])
        adapter = as_serve_does(InferenceServicer(service))
        add_inference_to_server(adapter, grpc_server)
        add_health_to_server(adapter, grpc_server)
        grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
        await grpc_server.start()
        while not http_server.started:
            await asyncio.sleep(0.005)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        grpc_address = f"127.0.0.1:{grpc_port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=None) as http,
            grpc.aio.insecure_channel(grpc_address) as channel,
        ):
            server = Server(engine, weight_version(model), service, url, http, channel, grpc_address)
            yield server
            await server.settled()
        await grpc_server.stop(None)
        http_server.should_exit = True
        await serving
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tiny_model: Path) -> AsyncIterator[Server]:
    """Shared by a file's tests; each of them leaves it with all its blocks free."""
    config = EngineConfig(model=ModelConfig(model=str(tiny_model)), cache=CacheConfig(num_blocks=100))
    async for each in start(AsyncEngine.start(config), tiny_model):
        yield each


@pytest_asyncio.fixture
async def narrow_server(tiny_model: Path) -> AsyncIterator[Server]:
    """One request runs and one may wait."""
    config = EngineConfig(
        model=ModelConfig(model=str(tiny_model)),
        cache=CacheConfig(num_blocks=100),
        scheduler=SchedulerConfig(max_num_seqs=1, max_waiting_requests=1),
    )
    async for each in start(AsyncEngine.start(config), tiny_model):
        yield each
