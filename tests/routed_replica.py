"""A replica in a process of its own, without Ray: both faces, and peers that are found by files in a folder.

    python -m tests.routed_replica '{"name": "a", "folder": "...", ...}'

Prints its HTTP url and gRPC address as JSON once it answers; ends when stdin does.
"""

import asyncio
import json
import sys
from pathlib import Path

import msgspec

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.engine.async_engine import AsyncEngine
from rayllm.models.hub import resolve_model
from rayllm.serve.local_state import LocalState
from rayllm.serve.peer import Address
from rayllm.serve.routed_engine import RoutedEngine
from tests.e2e.conftest import start


class Settings(msgspec.Struct, frozen=True):
    """`folder`: where the endpoint's replicas find each other; `key`: hexadecimal, of all of them."""

    name: str
    model: str
    folder: str
    key: str
    policy: str
    num_blocks: int


class FolderDirectory:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def join(self, name: str, address: Address) -> None:
        part = self._folder / f".{name}"
        part.write_text(json.dumps(address))
        part.rename(self._folder / name)

    def leave(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def replicas(self) -> dict[str, Address]:
        paths = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
        return {path.name: tuple(json.loads(path.read_text())) for path in paths}

    def clean(self) -> None:
        pass


async def serve(settings: Settings) -> None:
    config = EngineConfig(
        model=ModelConfig(model=settings.model, dtype="bfloat16"), cache=CacheConfig(num_blocks=settings.num_blocks)
    )
    engine, routed = AsyncEngine.start(config), None
    if settings.policy != "none":
        state = LocalState(
            engine,
            block_size=config.cache.block_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            is_draining=lambda: False,
        )
        routed = RoutedEngine(
            engine,
            state,
            FolderDirectory(Path(settings.folder)),
            name=settings.name,
            key=bytes.fromhex(settings.key),
            policy=settings.policy,
        )
        await routed.start("127.0.0.1")
    async for server in start(engine, resolve_model(settings.model), routed):
        print(json.dumps({"url": server.url, "grpc": server.grpc_address}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        if routed is not None:
            await routed.close(drain_timeout_s=1)


if __name__ == "__main__":
    asyncio.run(serve(msgspec.json.decode(sys.argv[1], type=Settings)))
