"""The engine for streams in this process, as the commands configure it."""

from rayllm.core.config import EngineConfig
from rayllm.engine.async_engine import AsyncEngine


def open_async_engine(config: EngineConfig) -> AsyncEngine:
    if config.parallel.world_size == 1:
        return AsyncEngine.start(config)
    from rayllm.engine.ray_executor import start_ray  # brings Ray

    return AsyncEngine.start(config, start_ray)
