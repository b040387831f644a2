"""The replica: one engine behind both faces, and its shards in the replica's own placement group."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import ray
from fastapi import FastAPI

from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.build import build_engine, prepare
from rayllm.engine.ray_executor import start_ray
from rayllm.models.weight_version import weight_version
from rayllm.serve.config import ServeConfig
from rayllm.serve.grpc_service import InferenceServicer
from rayllm.serve.openai_api import build_http_app
from rayllm.serve.service import InferenceService


class InferenceReplica(InferenceServicer):
    """Serve calls the gRPC methods by name, asks for the HTTP app once, and checks health."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._engine, service = await asyncio.to_thread(_start, config)
        super().__init__(service)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self._service, lifespan=self._lifespan)

    @property
    def is_draining(self) -> bool:
        return _serve_drains_this_replica()

    async def check_health(self) -> None:
        self._service.check_health()

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Serve ends the app's lifespan once the running requests are answered, or their time is up."""
        yield
        await self._engine.close()


def _serve_drains_this_replica() -> bool:
    """Serve tells a replica that it is to end only once its requests are answered, and its API has no word for the time
    until then; the actor around the replica knows."""
    actors = ray._private.worker.global_worker.actors.values()
    return any(actor._replica_impl._shutting_down for actor in actors if hasattr(actor, "_replica_impl"))


def _start(config: ServeConfig) -> tuple[AsyncEngine, InferenceService]:
    prepared = prepare(config.engine)
    version = weight_version(prepared.checkpoint.directory)
    engine = AsyncEngine(build_engine(prepared, start_ray))
    service = InferenceService(
        engine, model=config.served_model, weight_version=version, max_request_s=config.max_request_s
    )
    return engine, service
