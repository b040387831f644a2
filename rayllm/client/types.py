"""What the server answers, as plain data; completions and log-probabilities are those of the offline engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayllm.core.types import FinishReason, TokenLogprobs
from rayllm.engine.outputs import CompletionOutput

# Text, token ids, or the messages of a conversation ({"role": ..., "content": ...}).
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """In tokens. `cached`: those of the prompt that the prefix cache already held."""

    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """`prompt_logprobs` has one entry for each prompt token, None for those before `prompt_logprobs_start`; None when
    not asked for."""

    request_id: str
    model: str
    weight_version: str
    outputs: list[CompletionOutput]
    usage: Usage
    prompt_logprobs: list[TokenLogprobs | None] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A piece of one of the `n` answers. Text may lag behind the tokens.

    `finish_reason` comes with the answer's last piece, `usage` with the last of the stream, `prompt_logprobs` with the
    first of answer 0.
    """

    request_id: str
    weight_version: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    usage: Usage | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """`eos_token_ids` end an answer. The other two are the tokenizer's own; None where it has none, or the server is
    older and does not say."""

    model: str
    weight_version: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    bos_token_id: int | None
    eos_token_id: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the engine is doing now. Counters only grow; `last_step_age_s` is 0 while there is nothing to do.

    `last_detection_s` is how long the last loss of a shard went unnoticed, at most, and `last_recovery_s` how long it
    took to replace the shards.
    """

    running: int
    waiting: int
    waiting_tokens: int
    free_blocks: int
    total_blocks: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    preemptions: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    last_step_age_s: float
    recoveries: int
    last_detection_s: float
    last_recovery_s: float
