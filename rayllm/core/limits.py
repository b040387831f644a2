"""The bounds of a request that depend on the model served; those that do not are checked by `SamplingParams`."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import Request, SamplingParams, short_int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """In tokens: `max_model_len` is the context, `max_request_tokens` what the KV cache can hold for one sequence."""

    max_model_len: int
    vocab_size: int
    max_request_tokens: int

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises InvalidRequestError for a request that can never be served. Allocates nothing; looks at the ids only
        once their number is known to be within the context."""
        self._check_lengths(len(prompt_token_ids), params)
        for position, token_id in enumerate(prompt_token_ids):
            if type(token_id) is not int:
                raise InvalidRequestError(
                    "prompt", f"the token id at position {position} is a {type(token_id).__name__}, not an integer"
                )
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError("prompt", f"{self._outside(token_id)} (position {position})")
        start = params.prompt_logprobs_start
        if start > 1 and start >= len(prompt_token_ids):
            raise InvalidRequestError(
                "prompt_logprobs_start", f"{start} is past the last of the prompt's {len(prompt_token_ids)} tokens"
            )
        for name, token_ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logprob_token_ids", params.logprob_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            for token_id in token_ids:
                if token_id >= self.vocab_size:
                    raise InvalidRequestError(name, self._outside(token_id))

    def check_resume(self, request: Request) -> None:
        """Raises InvalidRequestError when the tokens that a request brings along cannot be the beginning of its answer.

        Whether one of them had ended it depends on the tokenizer as well, and is found where the request is queued.
        """
        params, resume = request.params, request.resume
        if not resume:
            return
        if len(resume) != params.n:
            raise InvalidRequestError("resume", f"has {len(resume)} sequences, but n is {params.n}")
        if not request.started:
            raise InvalidRequestError("resume", "says that every sequence is finished")
        if params.temperature > 0 and params.seed is None and any(request.started.values()):
            raise InvalidRequestError("resume", "needs the seed that the tokens were drawn with")
        room = min(self.max_model_len, self.max_request_tokens) - len(request.prompt_token_ids)
        if params.max_tokens is not None:
            room = min(room, params.max_tokens)
        for index, token_ids in request.started.items():
            if len(token_ids) >= room:
                raise InvalidRequestError(
                    "resume", f"sequence {index} has {len(token_ids)} tokens, and would have ended at {room}"
                )
            for token_id in token_ids:
                if not 0 <= token_id < self.vocab_size:
                    raise InvalidRequestError("resume", self._outside(token_id))

    def _check_lengths(self, prompt_len: int, params: SamplingParams) -> None:
        if prompt_len == 0:
            raise InvalidRequestError("prompt", "is empty")
        for capacity, what in (
            (self.max_model_len, "the context holds"),
            (self.max_request_tokens, "the KV cache of this server holds"),
        ):
            if prompt_len > capacity:
                raise InvalidRequestError("prompt", f"{prompt_len} tokens, but {what} {capacity}")
            room = capacity - prompt_len
            if room == 0:
                raise InvalidRequestError(
                    "prompt", f"{prompt_len} tokens leave no room for an answer; {what} {capacity}"
                )
            for name, wanted in (("max_tokens", params.max_tokens or 0), ("min_tokens", params.min_tokens)):
                if wanted > room:
                    raise InvalidRequestError(
                        name,
                        f"{wanted} after a prompt of {prompt_len} tokens is {prompt_len + wanted}, "
                        f"but {what} {capacity}",
                    )

    def _outside(self, token_id: int) -> str:
        return f"token id {short_int(token_id)} is not in the vocabulary of {self.vocab_size}"
