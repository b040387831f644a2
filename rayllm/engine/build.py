"""Puts an engine together: checkpoint, layout, tokenizer, executor, scheduler, limits, in that order.

Everything that can be refused without reading weights is refused first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from rayllm.core.config import EngineConfig
from rayllm.core.errors import ConfigError
from rayllm.core.limits import ModelLimits
from rayllm.core.tokenizer import Tokenizer
from rayllm.engine.engine import Engine
from rayllm.engine.executor import Executor, LocalExecutor
from rayllm.engine.model_runner import ModelRunner, resolve_device, resolve_dtype
from rayllm.engine.weights import Weights, check_replacement
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.hub import resolve_model
from rayllm.models.spec import DecoderSpec
from rayllm.parallel.load import check_layout
from rayllm.parallel.mesh import Mesh
from rayllm.scheduler.scheduler import Scheduler


class ShardConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rank needs to load its shard; sent to it as msgpack. `weights`: those that it is to hold."""

    weights: tuple[Weights, ...]
    engine: EngineConfig
    max_model_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A checkpoint that was checked against the configuration, weights unread."""

    config: EngineConfig
    checkpoint: Checkpoint
    weights: Weights
    tokenizer: Tokenizer
    max_model_len: int

    @property
    def shard(self) -> ShardConfig:
        return ShardConfig(weights=(self.weights,), engine=self.config, max_model_len=self.max_model_len)

    def replacement(self, directory: Path) -> Weights:
        """Weights that an engine with these can change to. Raises CheckpointError or ConfigError."""
        checkpoint = open_checkpoint(directory, self.config)
        check_replacement(checkpoint, self.checkpoint, self.tokenizer)
        return Weights.of(checkpoint)


class ExecutorFactory(Protocol):
    """Starts the ranks; returns the executor and how many KV blocks each of them holds."""

    def __call__(self, prepared: Prepared) -> tuple[Executor, int]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineParts:
    engine: Engine
    prepared: Prepared
    limits: ModelLimits

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prepared.tokenizer


def prepare(config: EngineConfig, held: Checkpoint | None = None) -> Prepared:
    """`held`: weights in memory, read in the place of those of `config.model.model`, which a single shard can do.

    Raises ConfigError or CheckpointError before any weight is read.
    """
    checkpoint = held or open_checkpoint(resolve_model(config.model.model), config)
    check_layout(checkpoint.spec, config.parallel.tensor, config.parallel.pipeline)
    return Prepared(
        config=config,
        checkpoint=checkpoint,
        weights=Weights.of(checkpoint) if held is None else Weights("in memory", str(held.directory)),
        tokenizer=Tokenizer.load(checkpoint.directory),
        max_model_len=_max_model_len(config, checkpoint.spec),
    )


def open_checkpoint(directory: Path, config: EngineConfig) -> Checkpoint:
    """Raises CheckpointError, or ConfigError where `config` asks for what cannot be done with it."""
    checkpoint = Checkpoint.open(directory)
    if checkpoint.int8 and config.model.quantize is not None:
        raise ConfigError(f"quantize: {directory} is an int8 checkpoint already; leave the option out")
    return checkpoint


def build_engine(prepared: Prepared, start_executor: ExecutorFactory) -> EngineParts:
    config, spec = prepared.config, prepared.checkpoint.spec
    executor, num_blocks = start_executor(prepared)
    scheduler = Scheduler(
        config.scheduler,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        max_model_len=prepared.max_model_len,
        eos_token_ids=prepared.tokenizer.eos_token_ids,
        in_flight=executor.in_flight,
        cache_key=_cache_key(spec),
        weight_version=prepared.weights.version,
    )
    limits = ModelLimits(
        max_model_len=prepared.max_model_len,
        vocab_size=spec.vocab_size,
        max_request_tokens=num_blocks * config.cache.block_size,
    )
    return EngineParts(engine=Engine(scheduler, executor, prepared.weights), prepared=prepared, limits=limits)


def start_local(prepared: Prepared) -> tuple[Executor, int]:
    """One rank in this process."""
    if prepared.config.parallel.world_size != 1:
        raise ConfigError("a model in this process has one shard; tensor or pipeline parallel ranks need Ray")

    def load() -> ModelRunner:
        runner = load_runner(prepared.shard, Mesh.single(), prepared.checkpoint)
        runner.init_cache(runner.num_blocks_that_fit)
        return runner

    executor = LocalExecutor(load)
    return executor, executor.num_blocks


def load_runner(shard: ShardConfig, mesh: Mesh, checkpoint: Checkpoint | None = None) -> ModelRunner:
    """`checkpoint`: that of the first weights, where it is open already."""
    first, *others = shard.weights
    checkpoint = checkpoint or first.open()
    device = resolve_device(shard.engine.model.device)
    runner = ModelRunner(
        checkpoint,
        mesh,
        shard.engine,
        weight_version=first.version,
        max_model_len=shard.max_model_len,
        dtype=resolve_dtype(shard.engine.model.dtype, checkpoint, device),
        device=device,
    )
    for weights in others:
        runner.hold(weights.version, runner.load(weights.open()))
    return runner


def _max_model_len(config: EngineConfig, spec: DecoderSpec) -> int:
    asked, trained = config.model.max_model_len, spec.max_position_embeddings
    if asked is None:
        return trained
    if spec.rope is None and asked > trained:
        raise ConfigError(f"max_model_len: {asked} is more than the {trained} positions that the model has learned")
    return asked


def _cache_key(spec: DecoderSpec) -> Callable[[int], bytes]:
    """Dynamic NTK rotates a prompt by its own length once that passes the original one: no sharing across lengths."""
    rope = spec.rope
    if rope is None or rope.type != "dynamic":
        return lambda prompt_len: b""
    original = rope.original_max_position_embeddings
    return lambda prompt_len: b"" if prompt_len <= original else prompt_len.to_bytes(8, "little")
