"""Likelihood requests as tokens: where a continuation begins, which windows cover a text, what the engine is asked.

The rules are lm-eval 0.4.13's (`TemplateLM._encode_pair`, `get_rolling_token_windows` with a context of one token), and
for strides the recipe of Hugging Face's documentation ("Perplexity of fixed-length models").
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rayllm.core.errors import ConfigError
from rayllm.core.types import SamplingParams, TokenLogprobs
from rayllm.engine.outputs import CompletionOutput
from rayllm.eval.task import Likelihood, Loglikelihood, RollingLoglikelihood

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """`targets`, each scored after all that is before it. Both are never empty."""

    context: Tokens
    targets: Tokens


class TextEncoder(Protocol):
    """The part of `rayllm.core.tokenizer.Tokenizer` that is needed here; an endpoint's may stand in for it."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class SpanMaker:
    """`max_input_tokens`: how many tokens the model can read to predict one more. Tokenizes each context once for all
    its continuations, when they follow each other."""

    def __init__(self, tokenizer: TextEncoder, max_input_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_input_tokens = max_input_tokens
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._prefix: int | None = prefix
        self._prefix_text = "" if prefix is None else tokenizer.decode([prefix], skip_special_tokens=False)
        self._last: tuple[str, list[int]] = ("", [])

    def spans(self, request: Loglikelihood | RollingLoglikelihood) -> list[Span]:
        """Raises ConfigError where a continuation with its context is longer than the model can read."""
        if isinstance(request, Loglikelihood):
            return [self._checked(self._continuation(request), request)]
        tokens = self.encode(request.text)
        window = min(request.window or self._max_input_tokens, self._max_input_tokens)
        if request.stride is not None:
            return list(strided_windows(tokens, window, request.stride))
        return list(disjoint_windows(tokens, self._prefix_id(), window))

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer adds of itself, unless the text has the first one already."""
        doubled = bool(self._prefix_text) and text.startswith(self._prefix_text)
        return self._tokenizer.encode(text, add_special_tokens=not doubled)

    def _continuation(self, request: Loglikelihood) -> Span:
        if not request.continuation:
            raise ConfigError("a continuation is empty, so that there is nothing to score")
        if not request.context:
            return self._unconditional(request.continuation)
        context = request.context.rstrip()
        continuation = request.context[len(context) :] + request.continuation
        if self._last[0] != context:
            self._last = (context, self.encode(context))
        context_ids = self._last[1]
        targets = self.encode(context + continuation)[len(context_ids) :]
        if not context_ids or not targets:
            raise ConfigError(f"{request.continuation[:80]!r} adds no token to the text before it")
        return Span(tuple(context_ids), tuple(targets))

    def _checked(self, span: Span, request: Loglikelihood) -> Span:
        num_tokens = len(span.context) + len(span.targets) - 1
        if num_tokens > self._max_input_tokens:
            raise ConfigError(
                f"a prompt of {num_tokens} tokens is longer than the {self._max_input_tokens} that the model reads "
                f"(it ends {request.context[-60:]!r}); use fewer shots, --num-fewshot, or --max-model-len"
            )
        return span

    def _unconditional(self, continuation: str) -> Span:
        targets = self._tokenizer.encode(continuation, add_special_tokens=False)
        prefix = self._prefix_id()
        if targets[0] == prefix and len(targets) > 1:
            return Span((prefix,), tuple(targets[1:]))
        return Span((prefix,), tuple(targets))

    def _prefix_id(self) -> int:
        if self._prefix is None:
            raise ConfigError("the tokenizer has neither bos nor eos, so that nothing can precede a first token")
        return self._prefix


def disjoint_windows(tokens: Sequence[int], prefix: int, window: int, *, min_context: int = 1) -> Iterator[Span]:
    """Every token once, as the target of a model that reads `window` tokens. The first window begins with `prefix`;
    later ones have `min_context` tokens of context; the last is filled up to its full length with tokens before it."""
    first = min(window, len(tokens))
    if first:
        yield Span((prefix,), tuple(tokens[:first]))
    num_targets = window - min_context + 1
    for start in range(first, len(tokens), num_targets):
        stop = min(start + num_targets, len(tokens))
        yield Span(tuple(tokens[stop - window - 1 : start]), tuple(tokens[start:stop]))


def strided_windows(tokens: Sequence[int], window: int, stride: int) -> Iterator[Span]:
    """Windows of `window` tokens that begin `stride` apart; each scores those of its tokens that no window before it
    held, but never its own first token, which nothing precedes."""
    scored = 0
    for start in range(0, len(tokens), stride):
        stop = min(start + window, len(tokens))
        first = max(scored, start + 1)
        if stop > first:
            yield Span(tuple(tokens[start:first]), tuple(tokens[first:stop]))
        scored = stop
        if stop == len(tokens):
            return


class Scores(Protocol):
    """What is read of an answer, whether the engine's or a client's."""

    @property
    def outputs(self) -> Sequence[CompletionOutput]: ...

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs | None] | None: ...


@dataclass(slots=True)
class ScoringCall:
    """One engine request for all spans that read the same tokens: those of choices that are one token long, say.

    The last target of a span is not read: its logprob is asked for where the engine would sample.
    """

    prompt: Tokens
    first_target: int  # its index in the prompt; the prompt's length where each span has one target only
    spans: list[tuple[int, int]] = field(default_factory=list)  # (owner of the span, its last target)

    def params(self) -> SamplingParams:
        scores_prompt = self.first_target < len(self.prompt)
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            logprobs=0,
            logprob_token_ids=tuple(sorted({target for _, target in self.spans})),
            prompt_logprobs=0 if scores_prompt else None,
            prompt_logprobs_start=self.first_target if scores_prompt else 1,
        )

    def likelihoods(self, output: Scores) -> Iterator[tuple[int, Likelihood]]:
        """Of each span, with its owner."""
        read = (output.prompt_logprobs or [])[self.first_target :]
        scored = [position for position in read if position is not None]
        assert len(scored) == len(self.prompt) - self.first_target, "a prompt token has no logprob"
        (completion,) = output.outputs
        assert completion.logprobs is not None
        asked = dict(completion.logprobs[0].top)
        logprob = math.fsum(position.logprob for position in scored)
        is_greedy = all(position.rank == 1 for position in scored)
        for owner, target in self.spans:
            yield (
                owner,
                Likelihood(
                    logprob=logprob + asked[target],
                    num_tokens=len(scored) + 1,
                    is_greedy=is_greedy and completion.token_ids == [target],
                ),
            )


def scoring_calls(spans: Sequence[tuple[int, Span]]) -> list[ScoringCall]:
    """`spans` with their owners, those that read the same tokens together."""
    calls: dict[tuple[Tokens, int], ScoringCall] = {}
    for owner, span in spans:
        prompt, first_target = span.context + span.targets[:-1], len(span.context)
        call = calls.setdefault((prompt, first_target), ScoringCall(prompt, first_target))
        call.spans.append((owner, span.targets[-1]))
    return list(calls.values())


def add_up(parts: Sequence[Likelihood]) -> Likelihood:
    """Of a text, from its windows'."""
    return Likelihood(
        logprob=math.fsum(part.logprob for part in parts),  # whatever the order in which they came
        num_tokens=sum(part.num_tokens for part in parts),
        is_greedy=all(part.is_greedy for part in parts),
    )
