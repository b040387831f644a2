"""The replica: one engine behind both faces, and its shards in the replica's own placement group."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.context import ReplicaContext

from rayllm.core.errors import RayLLMError
from rayllm.core.garbage import keep_what_is_loaded
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.build import Prepared, build_engine, prepare
from rayllm.engine.ray_executor import start_ray
from rayllm.serve.admin_api import AdminFace
from rayllm.serve.autoscaling import LOAD, TTFT, replica_load
from rayllm.serve.config import ServeConfig
from rayllm.serve.grpc_service import InferenceServicer
from rayllm.serve.local_state import LocalState
from rayllm.serve.openai_api import build_http_app
from rayllm.serve.promoter import Promoter
from rayllm.serve.ray_metrics import RaySink
from rayllm.serve.replica_directory import ReplicaDirectory
from rayllm.serve.routed_engine import RoutedEngine
from rayllm.serve.service import InferenceService
from rayllm.serve.weight_keeper import WeightKeeper
from rayllm.serve.weight_store import WeightStore

logger = logging.getLogger(__name__)

_PUBLISH_S: Final = 1.0  # Ray's agent reads every few seconds


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What all replicas of one deployment of the application share, and no others do: a name, and the key by which they
    know each other."""

    name: str
    key: bytes = field(repr=False)


class InferenceReplica(InferenceServicer):
    """Serve calls the gRPC methods by name, asks for the HTTP app once, and checks health."""

    async def __init__(self, config: ServeConfig, endpoint: Endpoint) -> None:  # type: ignore[misc]  # Serve awaits it
        context = serve.get_replica_context()
        replica, store = context.replica_id.unique_id, WeightStore(endpoint.name, context)
        self._config = config
        prepared = await asyncio.to_thread(_prepare, config, store)
        start = partial(start_ray, replicas=config.most_replicas)
        self._engine = await asyncio.to_thread(lambda: AsyncEngine(build_engine(prepared, start)))
        self._routed = self._among_peers(endpoint, context) if config.is_routed else None
        service = InferenceService(
            self._routed or self._engine,
            model=config.served_model,
            max_request_s=config.max_request_s,
            replica=replica,
            abort_everywhere=None if self._routed is None else self._routed.abort_everywhere,
        )
        service.metrics.export_to(RaySink())
        if self._routed is not None:
            self._routed.attach(service)
        super().__init__(service)
        self._keeper = WeightKeeper(self._engine, store, replica)
        self._admin = AdminFace(service, Promoter(prepared, store))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self._service, self._lifespan, self._admin)

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
        if self._routed is not None:
            await self._routed.start(ray.util.get_node_ip_address())
        keep_what_is_loaded()
        tasks = [asyncio.create_task(self._publish()), asyncio.create_task(self._keeper.run())]
        yield
        if self._routed is not None:
            await self._routed.close(drain_timeout_s=self._config.drain_timeout_s)
        for task in tasks:
            task.cancel()
        await self._engine.close()

    def _among_peers(self, endpoint: Endpoint, context: ReplicaContext) -> RoutedEngine:
        engine = self._config.engine
        state = LocalState(
            self._engine,
            block_size=engine.cache.block_size,
            max_num_seqs=engine.scheduler.max_num_seqs,
            is_draining=_serve_drains_this_replica,
        )
        return RoutedEngine(
            self._engine,
            state,
            ReplicaDirectory(endpoint.name, context),
            name=context.replica_id.unique_id,
            key=endpoint.key,
            policy=self._config.routing,
        )

    async def _publish(self) -> None:
        while True:
            self._service.metrics.publish()
            await asyncio.sleep(_PUBLISH_S)


def _serve_drains_this_replica() -> bool:
    """Serve tells a replica that it is to end only once its requests are answered, and its API has no word for the time
    until then; the actor around the replica knows."""
    actors = ray._private.worker.global_worker.actors.values()
    return any(actor._replica_impl._shutting_down for actor in actors if hasattr(actor, "_replica_impl"))


def _prepare(config: ServeConfig, store: WeightStore) -> Prepared:
    """With the weights that the endpoint has come to, if they were changed. Where those cannot be had any more, with
    the ones before or else the configuration's: from replicas that do not start there is no rolling back."""
    record = store.read()
    for weights in () if record is None else (record.current, record.previous):
        if weights is None:
            continue
        try:
            prepared = prepare(replace(config.engine, model=replace(config.engine.model, model=weights.directory)))
            if prepared.weights.version == weights.version:
                return prepared
            logger.error("%s holds other weights than %s, as it did", weights.directory, weights.version)
        except RayLLMError as error:
            logger.error("%s, which the endpoint has come to, cannot be loaded: %s", weights.version, error)
    return prepare(config.engine)
