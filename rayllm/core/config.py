"""What a user decides before the engine starts.

Run-time facts (the number of blocks, the end-of-sequence ids) are returned by those who find them, never written back.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from rayllm.core.errors import ConfigError
from rayllm.core.types import MAX_TOKENS

MAX_NUM_SEQS = 1 << 16  # each has its row of the block table, full or not
MAX_NUM_BATCHED_TOKENS = 1 << 20  # of one step, whose activations are all held at once

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8")
QUANTIZE = ("w8a8", "w8a16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """`model`: a Hugging Face directory or hub name, a .gguf file, or the name of an embedded model."""

    model: str
    dtype: str = "auto"  # auto: the checkpoint's own
    max_model_len: int | None = None  # None: the checkpoint's own
    device: str = "auto"  # auto: cuda where there is one, else cpu
    quantize: Literal["w8a8", "w8a16"] | None = None  # int8 linear layers, made as the weights are read

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.quantize is not None and self.quantize not in QUANTIZE:
            raise ConfigError(f"quantize: {self.quantize!r} is not one of {', '.join(QUANTIZE)}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len: {self.max_model_len} is less than 2")
        if self.max_model_len is not None and self.max_model_len > MAX_TOKENS:
            raise ConfigError(f"max_model_len: {self.max_model_len} is more than {MAX_TOKENS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """`tensor` ranks hold a slice of every matrix; `pipeline` stages hold some of the layers.

    `shard_recovery_timeout_s`: when a rank is lost, how long requests wait for new ones before they fail; 0: not at
    all. The default is for some 100 GB of weights from a local disk, and well within what clients wait for an answer.
    """

    tensor: int = 1
    pipeline: int = 1
    shard_recovery_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} parallel size: {getattr(self, name)} is less than 1")
        if not 0 <= self.shard_recovery_timeout_s < math.inf:
            raise ConfigError(f"shard_recovery_timeout_s: {self.shard_recovery_timeout_s} is not a number of seconds")

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Size of the KV cache of one rank: `num_blocks` if given, else a share of memory.

    On CUDA the share is `gpu_memory_fraction` of the card, weights included. On CPU it is `cpu_memory_bytes`,
    explicit because nobody else's memory may be taken for granted.

    `dtype` int8 keeps a byte for each value and a scale for each token and head: nearly twice the tokens of bfloat16,
    and half the bytes to read, for answers that differ a little.
    """

    dtype: str = "auto"  # auto: the model's own
    block_size: int = 16  # tokens
    num_blocks: int | None = None
    gpu_memory_fraction: float = 0.9
    cpu_memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.dtype not in KV_CACHE_DTYPES:
            raise ConfigError(f"KV cache dtype: {self.dtype!r} is not one of {', '.join(KV_CACHE_DTYPES)}")
        if self.block_size < 1:
            raise ConfigError(f"block_size: {self.block_size} is less than 1")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(f"num_blocks: {self.num_blocks} is less than 1")
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            raise ConfigError(f"gpu_memory_fraction: {self.gpu_memory_fraction} is not in (0, 1]")
        if self.cpu_memory_bytes < 1:
            raise ConfigError(f"cpu_memory_bytes: {self.cpu_memory_bytes} is less than 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """`max_num_batched_tokens` is the budget of one step, shared by prefill chunks and decodes.

    The waiting queue is bounded by requests and by prompt tokens; past either a request is refused at once. As many
    more may wait as of the `max_num_seqs` do not run: until the next step as a rule, longer for want of KV blocks.
    """

    max_num_batched_tokens: int = 1024
    max_num_seqs: int = 64
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_waiting_requests", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is less than 1")
        if self.max_num_seqs > MAX_NUM_SEQS:
            raise ConfigError(f"max_num_seqs: {self.max_num_seqs} is more than {MAX_NUM_SEQS}")
        if self.max_num_batched_tokens > MAX_NUM_BATCHED_TOKENS:
            raise ConfigError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is more than {MAX_NUM_BATCHED_TOKENS}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
