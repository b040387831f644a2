"""Perplexity of a text by weights that an engine holds, current or not: whether new ones may answer clients.

By token, over disjoint windows as long as the context: the windows of the evaluation's `perplexity`.
"""

import asyncio
import math
import uuid

from rayllm.core.errors import CapacityError, PromotionError
from rayllm.core.types import Request
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.outputs import CompletionOutput, RequestOutput
from rayllm.eval.scoring import ScoringCall, SpanMaker, add_up, scoring_calls
from rayllm.eval.task import Likelihood, RollingLoglikelihood

MAX_RATIO = 1.01  # of the new weights' perplexity to the current ones'
_MOST_NATS = 700.0  # a token, whose exponential a float still holds: weights that diverged lose more


async def check_perplexity(engine: AsyncEngine, text: str, *, new: str, before: str) -> tuple[float, float]:
    """By the versions `new` and `before`. Raises PromotionError when the former is more than `MAX_RATIO` times the
    latter, and ModelOutputError when weights give no probabilities."""
    nats_new, nats_before = [await _nats_per_token(engine, text, version) for version in (new, before)]
    by_new, by_before = [math.exp(min(nats, _MOST_NATS)) for nats in (nats_new, nats_before)]
    if not nats_new <= nats_before + math.log(MAX_RATIO):
        raise PromotionError(
            f"the gate's text has a perplexity of {by_new:.4g} by {new}, more than {MAX_RATIO - 1:.0%} above the"
            f" {by_before:.4g} by {before}"
        )
    return by_new, by_before


async def _nats_per_token(engine: AsyncEngine, text: str, weight_version: str) -> float:
    context = min(engine.limits.max_model_len, engine.limits.max_request_tokens) - 1  # it predicts one more
    spans = SpanMaker(engine.tokenizer, context).spans(RollingLoglikelihood(text=text))
    parts = [await _score(engine, call, weight_version) for call in scoring_calls([(0, span) for span in spans])]
    whole = add_up([likelihood for part in parts for likelihood in part])
    return -whole.logprob / max(whole.num_tokens, 1)


async def _score(engine: AsyncEngine, call: ScoringCall, weight_version: str) -> list[Likelihood]:
    while True:
        try:
            output = await _answer(engine, call, weight_version)
            return [likelihood for _, likelihood in call.likelihoods(output)]
        except CapacityError as full:
            await asyncio.sleep(full.retry_after_s)


async def _answer(engine: AsyncEngine, call: ScoringCall, weight_version: str) -> RequestOutput:
    request = Request(
        request_id=f"gate-{uuid.uuid4().hex}",
        prompt_token_ids=call.prompt,
        params=call.params(),
        weight_version=weight_version,
    )
    completion = CompletionOutput(index=0, text="", token_ids=[], logprobs=[], finish_reason=None, stop_reason=None)
    output = RequestOutput(
        request_id=request.request_id,
        prompt=None,
        prompt_token_ids=list(call.prompt),
        prompt_logprobs=None,
        outputs=[completion],
        num_cached_tokens=0,
    )
    async for delta in engine.generate(request):
        completion.token_ids += delta.token_ids
        completion.logprobs = [*(completion.logprobs or ()), *(delta.logprobs or ())]
        output.prompt_logprobs = output.prompt_logprobs or delta.prompt_logprobs
    return output
