"""One engine step on the wire: what the scheduler asks of every rank, and what the sampling rank answers.

The structs are encoded with msgspec's msgpack (never pickle). A rank keeps each sequence's tokens, block table and
sampling state between steps, so a step carries increments only: nothing here grows with a sequence's context
except the one `NewSequence` at its admission.
"""

import msgspec

NO_TOKEN = -1  # a row whose logits are NaN or leave nothing possible


class SamplerSpec(msgspec.Struct, frozen=True, array_like=True):
    """`SamplingParams` as the sampler needs them: the seed resolved, text-level stops left out."""

    temperature: float
    top_k: int  # 0: all
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: dict[int, float]
    seed: int  # 64 bits, unsigned
    min_tokens: int
    suppressed: list[int]  # never sampled while fewer than min_tokens are out (eos and stop tokens)
    logprobs: int | None
    logprob_token_ids: list[int]
    prompt_logprobs: int | None
    prompt_logprobs_start: int  # the first token whose logprobs are not known yet


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence admitted in this step (or again, after preemption). `token_ids`: all that is known, prompt first."""

    seq_id: int
    token_ids: list[int]
    prompt_len: int
    sampler: SamplerSpec


class ScheduledSequence(msgspec.Struct, frozen=True, array_like=True):
    """`num_tokens` tokens of one sequence, from position `start` on.

    `new_token_ids` are appended to the rank's copy of the tokens first (the token sampled last; empty for a prefill).
    `new_block_ids` are appended to its block table. `sample`: the last position's logits give the next token.
    """

    seq_id: int
    start: int
    num_tokens: int
    new_token_ids: list[int]
    new_block_ids: list[int]
    sample: bool


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """`released`: sequences that finished, were aborted or preempted since the last step; their rows are free.

    `scheduled`: sequences that start at position 0 come last, shorter parts first; so prompts of which nothing is
    cached, from any length on, are the end of the step. `weight_version`: the weights that compute it, of all that the
    ranks hold.
    """

    step_id: int
    released: list[int]
    new: list[NewSequence]
    scheduled: list[ScheduledSequence]
    weight_version: str


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """See `rayllm.core.types.TokenLogprobs`."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class SequenceResult(msgspec.Struct, frozen=True, array_like=True):
    """`token_id` is None where the step did not sample, NO_TOKEN where it could not.

    `prompt_logprobs` cover the chunk's positions, for tokens start + 1 .. start + num_tokens that lie in the prompt,
    from the sampler's `prompt_logprobs_start` on; None when not asked for.
    """

    seq_id: int
    token_id: int | None
    logprobs: PositionLogprobs | None
    prompt_logprobs: list[PositionLogprobs] | None


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """In the order of `Batch.scheduled`."""

    step_id: int
    sequences: list[SequenceResult]
