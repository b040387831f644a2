"""The engine in this process, as the commands configure it: offline, or for streams."""

from rayllm.core.config import EngineConfig
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.llm import LLM


def open_llm(config: EngineConfig) -> LLM:
    return LLM(
        config.model.model,
        dtype=config.model.dtype,
        tensor_parallel_size=config.parallel.tensor,
        pipeline_parallel_size=config.parallel.pipeline,
        max_model_len=config.model.max_model_len,
        quantize=config.model.quantize,
        cache=config.cache,
        scheduler=config.scheduler,
    )


def open_async_engine(config: EngineConfig) -> AsyncEngine:
    if config.parallel.world_size == 1:
        return AsyncEngine.start(config)
    from rayllm.engine.ray_executor import start_ray  # brings Ray

    return AsyncEngine.start(config, start_ray)
