"""The filtered distribution against transformers' logits processors, run in float64."""

import itertools
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from rayllm.engine.sampler import Sampler
from rayllm.engine.truncation import Candidates, Filters, draw, filtered
from rayllm.scheduler.batch import NewSequence, SamplerSpec

CPU = torch.device("cpu")
BASE = SamplerSpec(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    logit_bias={},
    seed=0,
    min_tokens=0,
    suppressed=[],
    logprobs=None,
    logprob_token_ids=[],
    prompt_logprobs=None,
    prompt_logprobs_start=0,
)


def spec(**changes: object) -> SamplerSpec:
    return msgspec.structs.replace(BASE, **changes)


def sequence(params: SamplerSpec, prompt: Sequence[int] = (1,), output: Sequence[int] = ()) -> NewSequence:
    return NewSequence(seq_id=0, token_ids=[*prompt, *output], prompt_len=len(prompt), sampler=params)


def openai_penalties(scores: Tensor, params: SamplerSpec, output: Sequence[int]) -> Tensor:
    scores = scores.clone()
    for token_id in set(output):
        scores[0, token_id] -= output.count(token_id) * params.frequency_penalty + params.presence_penalty
    return scores


def reference_scores(logits: Tensor, params: SamplerSpec, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Float64 scores [1, V] before the temperature."""
    scores = logits.double()[None].clone()
    for token_id, bias in params.logit_bias.items():
        scores[0, token_id] += bias
    input_ids = torch.tensor([[*prompt, *output]])
    processors = hf.LogitsProcessorList()
    if params.min_tokens and params.suppressed:
        processors.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, params.suppressed))
    if params.repetition_penalty != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    return openai_penalties(processors(input_ids, scores), params, output)


def reference_probs(scores: Tensor, params: SamplerSpec) -> Tensor:
    """[V]: temperature, top-k, top-p and min-p in the order of `GenerationMixin._get_logits_processor`."""
    warpers = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    return warpers(torch.tensor([[0]]), scores).softmax(dim=-1)[0]


def dense(candidates: Sequence[Candidates], num_rows: int, vocab_size: int) -> Tensor:
    """The weights [S, V] of candidates that together cover S rows once."""
    weights = torch.full((num_rows, vocab_size), -1)
    for some in candidates:
        rows = torch.zeros(len(some.rows_C), vocab_size, dtype=torch.int64)
        rows.scatter_(-1, some.token_ids_CK, some.weights_CK)
        assert bool((weights[some.rows_C] == -1).all())
        assert bool((some.token_ids_CK.diff(dim=-1) > 0).all())
        weights[some.rows_C] = rows
    assert bool((weights >= 0).all())
    return weights


@torch.inference_mode()
def sampled_probs(sampler: Sampler, logits: Tensor, rows: Sequence[int]) -> Tensor:
    """What `sample` draws from: [B, V] float64, by the functions that it calls."""
    plan = sampler._plan_for(rows)
    scores = sampler._adjusted_scores(logits, plan)
    weights = torch.zeros(logits.shape, dtype=torch.int64)
    for group in plan.draws:
        weights[group.rows] = dense(
            list(filtered(scores[group.rows], group.filters)), len(group.states), logits.shape[1]
        )
    return weights.double() / weights.sum(dim=-1, keepdim=True)


def assert_same_distribution(got: Tensor, want: Tensor, scores: Tensor) -> None:
    """Token by token, except that of equal scores at the edge of top-p transformers keeps any and we the lower ids."""
    # Within equal scores those with a probability come last, whichever they are.
    want_order, got_order = (np.lexsort((probs.numpy(), scores.numpy())) for probs in (want, got))
    want_probs, got_probs = want.numpy()[want_order], got.numpy()[got_order]
    np.testing.assert_allclose(got_probs, want_probs, atol=1e-5, rtol=0)
    assert not got_probs[want_probs == 0.0].any()
    assert got_probs[want_probs > 1e-15].all()  # a probability below 1e-16 may be rounded to 0
    for score in scores[want > 1e-15].unique():
        kept = got[scores == score] > 0
        assert bool((kept[:-1] | ~kept[1:]).all())


GRID = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.05, 0.7, 1.0, 2.5), (0, 1, 5, 130, 10_000), (1.0, 0.95, 0.55, 1e-9), (0.0, 0.02, 1.0)
    )
]


@pytest.mark.parametrize("vocab_size", [3, 131, 5003])
@pytest.mark.parametrize("tied", [False, True])
def test_filters_equal_transformers(vocab_size: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    specs = [spec(**params) for params in GRID]
    logits = torch.randn(len(specs), vocab_size, generator=generator) * 3
    if tied:
        logits = (logits * 2).round() / 2
    sampler = Sampler(vocab_size=vocab_size, max_rows=len(specs), device=CPU)
    for row, params in enumerate(specs):
        sampler.add(row, sequence(params))
    got = sampled_probs(sampler, logits, range(len(specs)))
    for row, params in enumerate(specs):
        scores = logits[row].double()[None]
        assert_same_distribution(got[row], reference_probs(scores, params), scores[0])


@pytest.mark.parametrize("seed", range(3))
def test_whole_chain_equals_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size, batch = 97, 40
    logits = torch.from_numpy(rng.normal(size=(batch, vocab_size)) * 3).bfloat16()
    sampler = Sampler(vocab_size=vocab_size, max_rows=batch, device=CPU)
    cases = []
    for row in range(batch):
        params = spec(
            temperature=float(rng.choice([0.3, 1.0, 1.7])),
            top_k=int(rng.choice([0, 0, 3, 20, 200])),
            top_p=float(rng.choice([1.0, 0.9, 0.6])),
            min_p=float(rng.choice([0.0, 0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
            frequency_penalty=float(rng.choice([0.0, 0.5, -0.3])),
            presence_penalty=float(rng.choice([0.0, 0.7, -0.4])),
            logit_bias={int(i): float(rng.normal() * 5) for i in rng.choice(vocab_size, rng.integers(0, 4), False)},
            min_tokens=int(rng.choice([0, 4, 8])),
            suppressed=[int(i) for i in rng.choice(vocab_size, rng.integers(0, 4), False)],
        )
        prompt = [int(i) for i in rng.integers(vocab_size, size=rng.integers(1, 9))]
        output = [int(i) for i in rng.integers(12, size=rng.integers(0, 9))]  # repeats
        cases.append((params, prompt, output))
        split = int(rng.integers(len(output) + 1))  # some of the output comes with the sequence, some is appended
        sampler.add(row, sequence(params, prompt, output[:split]))
        for token_id in output[split:]:
            sampler.append(row, token_id)
    rows = [int(i) for i in rng.permutation(batch)]
    got = sampled_probs(sampler, logits, rows)
    for i, row in enumerate(rows):
        params, prompt, output = cases[row]
        scores = reference_scores(logits[i], params, prompt, output)
        assert_same_distribution(got[i], reference_probs(scores, params), scores[0])


@pytest.mark.parametrize("vocab_size", [300, 5003, 20_011])
def test_sorting_a_prefix_is_exactly_sorting_all(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor([0.0, 0.01, 0.5, 1.0, 2.0, 4.0, 8.0])[:, None]  # from uniform to peaked
    logits = torch.randn(len(spread), vocab_size, generator=generator) * spread
    logits = torch.cat((logits, logits.bfloat16().float(), logits.round()))
    logits[0, vocab_size // 3 :] = float("-inf")
    for top_k, top_p in [(0, 0.9), (0, 0.3), (0, 0.9999), (128, 1.0), (127, 0.9), (129, 0.9), (2048, 0.99), (3, 0.5)]:
        filters = Filters.build([spec(top_k=top_k, top_p=top_p)] * len(logits), vocab_size, CPU)
        if not filters.truncates:
            continue
        want = list(filtered(logits, filters, prefix_sizes=()))
        assert len(want) == 1
        for prefix_sizes in ((128, 2048), (1, 2, 7)):
            got = list(filtered(logits, filters, prefix_sizes=prefix_sizes))
            assert torch.equal(dense(got, *logits.shape), dense(want, *logits.shape))


def test_draw_is_the_exact_inverse_of_the_cumulative_distribution() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = int(rng.integers(1, 9))
        weights = rng.integers(0, 1 << int(rng.integers(1, 59)), size=size) * (rng.random(size) < 0.6)
        weights[rng.integers(size)] = max(1, weights.max())
        uniform = [0, (1 << 62) - 1, *(int(u) for u in rng.integers(0, 1 << 62, size=5))]
        candidates = Candidates(
            rows_C=torch.arange(len(uniform)),
            token_ids_CK=torch.arange(0, 10 * size, 10).expand(len(uniform), -1),
            weights_CK=torch.from_numpy(weights).expand(len(uniform), -1),
        )
        got = draw(candidates, torch.tensor(uniform)).tolist()
        cumulative = list(itertools.accumulate(int(weight) for weight in weights))
        for u, token_id in zip(uniform, got, strict=True):
            target = u * cumulative[-1] >> 62  # Python's integers do not overflow
            position = next(i for i, total in enumerate(cumulative) if total > target)
            assert token_id == 10 * position
            assert weights[position] > 0
