"""What a caller gets back, in the shape that vLLM's users know."""

from dataclasses import dataclass

from rayllm.core.types import FinishReason, TokenLogprobs


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One of the `n` answers to a prompt.

    `stop_reason` is the stop string or the stop token that ended it; None for an end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """`prompt_logprobs` has one entry per prompt token, None for those before `prompt_logprobs_start`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int


@dataclass(kw_only=True, slots=True)
class OutputDelta:
    """A streamed piece of one of the `n` sequences of a request: the tokens and the text that are new.

    Text may lag behind the tokens while it could be half a character or the start of a stop string.
    `prompt_logprobs` come with the first piece of sequence 0 only. `queue_s`: how long the sequence waited before it
    was admitted.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    num_cached_tokens: int
    queue_s: float

    def extend(self, later: "OutputDelta") -> None:
        """Append a later piece of the same sequence."""
        self.text += later.text
        self.token_ids.extend(later.token_ids)
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs.extend(later.logprobs)
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
