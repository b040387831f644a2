"""The replica: one engine behind both faces, and its shards in the replica's own placement group."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import ray
from fastapi import FastAPI
from ray import serve

from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.build import build_engine, prepare
from rayllm.engine.ray_executor import start_ray
from rayllm.serve.autoscaling import LOAD, TTFT, replica_load
from rayllm.serve.config import ServeConfig
from rayllm.serve.grpc_service import InferenceServicer
from rayllm.serve.openai_api import build_http_app
from rayllm.serve.ray_metrics import RaySink
from rayllm.serve.service import InferenceService

_PUBLISH_S: Final = 1.0  # Ray's agent reads every few seconds


class InferenceReplica(InferenceServicer):
    """Serve calls the gRPC methods by name, asks for the HTTP app once, and checks health."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        self._engine, service = await asyncio.to_thread(_start, config)
        service.metrics.export_to(RaySink())
        super().__init__(service)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self._service, lifespan=self._lifespan)

    @property
    def is_draining(self) -> bool:
        return _serve_drains_this_replica()

    async def check_health(self) -> None:
        self._service.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        load = replica_load(
            self._service.stats(),
            max_num_seqs=self._config.engine.scheduler.max_num_seqs,
            block_size=self._config.engine.cache.block_size,
        )
        return {LOAD: load, TTFT: self._service.recent_ttft.seconds()}

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Serve ends the app's lifespan once the running requests are answered, or their time is up."""
        publishing = asyncio.create_task(self._publish())
        yield
        publishing.cancel()
        await self._engine.close()

    async def _publish(self) -> None:
        while True:
            self._service.metrics.publish()
            await asyncio.sleep(_PUBLISH_S)


def _serve_drains_this_replica() -> bool:
    """Serve tells a replica that it is to end only once its requests are answered, and its API has no word for the time
    until then; the actor around the replica knows."""
    actors = ray._private.worker.global_worker.actors.values()
    return any(actor._replica_impl._shutting_down for actor in actors if hasattr(actor, "_replica_impl"))


def _start(config: ServeConfig) -> tuple[AsyncEngine, InferenceService]:
    prepared = prepare(config.engine)
    engine = AsyncEngine(build_engine(prepared, start_ray))
    service = InferenceService(
        engine,
        model=config.served_model,
        max_request_s=config.max_request_s,
        replica=serve.get_replica_context().replica_id.unique_id,
    )
    return engine, service
