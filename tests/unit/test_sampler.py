from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from rayllm.engine.sampler import Sampler
from rayllm.scheduler.batch import NO_TOKEN, NewSequence, SamplerSpec

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
NAN, INF = float("nan"), float("inf")


def spec(**changes: object) -> SamplerSpec:
    return msgspec.structs.replace(BASE, **changes)


def sequence(params: SamplerSpec, token_ids: Sequence[int] = (1,), prompt_len: int = 1) -> NewSequence:
    return NewSequence(seq_id=0, token_ids=list(token_ids), prompt_len=prompt_len, sampler=params)


def make(vocab_size: int, specs: Sequence[SamplerSpec]) -> Sampler:
    sampler = Sampler(vocab_size=vocab_size, max_rows=len(specs), device=CPU)
    for row, params in enumerate(specs):
        sampler.add(row, sequence(params))
    return sampler


def tokens(sampler: Sampler, logits: Tensor, rows: Sequence[int]) -> list[int]:
    return [token_id for token_id, _ in sampler.sample(logits, rows)]


def mixed_specs(rng: np.random.Generator, vocab_size: int, n: int) -> list[SamplerSpec]:
    return [
        spec(
            temperature=float(rng.choice([0.0, 0.6, 1.0, 3.0])),
            top_k=int(rng.choice([0, 0, 4, 50, 300])),
            top_p=float(rng.choice([1.0, 0.95, 0.5])),
            min_p=float(rng.choice([0.0, 0.0, 0.1])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            frequency_penalty=float(rng.choice([0.0, 0.4])),
            presence_penalty=float(rng.choice([0.0, 0.3])),
            logit_bias={int(rng.integers(vocab_size)): 2.0} if rng.random() < 0.3 else {},
            seed=int(rng.integers(1 << 64, dtype=np.uint64)),
            min_tokens=int(rng.choice([0, 3])),
            suppressed=[int(rng.integers(vocab_size))],
            logprobs=[None, 0, 3][rng.integers(3)],
        )
        for _ in range(n)
    ]


class Frequencies:
    """Draws from one distribution over a small vocabulary, with seeds 0..n-1 or at token positions 0..n-1."""

    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, 1.5, -1.0, -4.0])

    def draw(self, params: SamplerSpec, n: int, vary: str) -> np.ndarray:
        batch = 1000
        drawn: list[int] = []
        for start in range(0, n, batch):
            numbers = range(start, start + batch)
            sampler = Sampler(vocab_size=8, max_rows=batch, device=CPU)
            for row, number in enumerate(numbers):
                if vary == "seed":
                    sampler.add(row, sequence(msgspec.structs.replace(params, seed=number)))
                else:
                    sampler.add(row, sequence(params, [1] * (number + 1)))
            drawn += tokens(sampler, self.logits.expand(batch, -1), range(batch))
        return np.bincount(drawn, minlength=8)


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"top_k": 3}, [0, 1, 5]),
        ({"top_p": 0.85}, [0, 1, 2, 5]),  # 0.405 + 0.246 + 0.149 = 0.800, with the next 0.891
        ({"min_p": 0.3}, [0, 1, 5]),  # relative to the best: 1, 0.61, 0.37, 0.22
        ({"temperature": 2.0, "top_k": 6, "top_p": 0.9}, [0, 1, 2, 3, 5]),
    ],
)
def test_frequencies_follow_the_analytic_distribution(params: dict[str, float], kept: list[int], vary: str) -> None:
    n = 20_000
    frequencies = Frequencies()
    counts = frequencies.draw(spec(**params), n, vary)
    scores = frequencies.logits.double().numpy() / params.get("temperature", 1.0)
    probs = np.exp(scores[kept]) / np.exp(scores[kept]).sum()
    assert counts.sum() == counts[kept].sum() == n
    assert stats.chisquare(counts[kept], probs * n).pvalue > 0.001
    # The test can fail: 20 % more temperature, or two tokens exchanged, is told apart.
    wrong = np.exp(scores[kept] / 1.2) / np.exp(scores[kept] / 1.2).sum()
    assert stats.chisquare(counts[kept], wrong * n).pvalue < 0.001
    exchanged = probs[[1, 0, *range(2, len(kept))]]
    assert stats.chisquare(counts[kept], exchanged * n).pvalue < 0.001


@pytest.mark.parametrize(("vocab_size", "scale"), [(1000, 3.0), (20_011, 1.0)])
def test_a_token_does_not_depend_on_the_batch(vocab_size: int, scale: float) -> None:
    rng = np.random.default_rng(vocab_size)
    batch = 16
    logits = torch.from_numpy(rng.normal(size=(batch, vocab_size)) * scale).bfloat16()
    specs = mixed_specs(rng, vocab_size, batch)
    alone = []
    for row, params in enumerate(specs):
        sampler = make(vocab_size, [params])
        alone += sampler.sample(logits[row : row + 1], [0])
    for _ in range(3):
        order = rng.permutation(batch)
        sampler = make(vocab_size, [specs[i] for i in order])
        rows = [int(row) for row in rng.permutation(batch)]
        in_batch = sampler.sample(logits[order[rows]], rows)
        assert in_batch == [alone[i] for i in order[rows]]
        assert sampler.sample(logits[order[rows]], rows) == in_batch  # sampling leaves no trace
    assert len({token_id for token_id, _ in alone}) > 8


def toy_logits(token_ids: Sequence[int], vocab_size: int) -> Tensor:
    """A "model" whose logits depend on all tokens so far."""
    generator = torch.Generator().manual_seed(hash(tuple(token_ids)) % (1 << 31))
    return torch.randn(vocab_size, generator=generator) * 2


def test_a_sequence_goes_on_as_before_after_it_was_taken_out() -> None:
    vocab_size, steps = 50, 12
    rng = np.random.default_rng(5)
    specs = [msgspec.structs.replace(params, temperature=1.0) for params in mixed_specs(rng, vocab_size, 6)]
    prompts = [[int(i) for i in rng.integers(vocab_size, size=4)] for _ in specs]

    def run(preempt: bool) -> list[list[int]]:
        sampler = Sampler(vocab_size=vocab_size, max_rows=9, device=CPU)
        texts = [list(prompt) for prompt in prompts]
        row_of = list(range(len(specs)))
        for i, params in enumerate(specs):
            sampler.add(row_of[i], sequence(params, texts[i], 4))
        for step in range(steps):
            if preempt and step % 3 == 2:
                for i in (step // 3, step // 3 + 1):
                    sampler.remove(row_of[i])
                for i in (step // 3 + 1, step // 3):
                    row_of[i] = min(set(range(8, -1, -1)) - set(row_of))
                    sampler.add(row_of[i], sequence(specs[i], texts[i], 4))
            logits = torch.stack([toy_logits(text, vocab_size) for text in texts])
            for i, token_id in enumerate(tokens(sampler, logits, row_of)):
                texts[i].append(token_id)
                sampler.append(row_of[i], token_id)
        return texts

    assert run(preempt=True) == run(preempt=False)


@torch.inference_mode()
def test_penalties_follow_rows_that_come_and_go() -> None:
    """Slots are reused and the table grows; the scores always are those of a plain computation."""
    vocab_size, max_rows = 11, 6
    rng = np.random.default_rng(2)
    sampler = Sampler(vocab_size=vocab_size, max_rows=max_rows, device=CPU)
    live: dict[int, tuple[SamplerSpec, list[int]]] = {}
    for _ in range(300):
        row = int(rng.integers(max_rows))
        if row not in live:
            (params,) = mixed_specs(rng, vocab_size, 1)
            token_ids = [int(i) for i in rng.integers(vocab_size, size=rng.integers(2, 6))]
            sampler.add(row, sequence(params, token_ids, 2))
            live[row] = (params, token_ids)
        elif rng.random() < 0.2:
            sampler.remove(row)
            del live[row]
        else:
            token_id = int(rng.integers(vocab_size))
            sampler.append(row, token_id)
            live[row][1].append(token_id)
        rows = [int(i) for i in rng.permutation(list(live))]
        logits = torch.from_numpy(rng.normal(size=(len(rows), vocab_size)).astype(np.float32))
        got = sampler._adjusted_scores(logits, sampler._plan_for(rows))
        for scores, before, row in zip(got.tolist(), logits.tolist(), rows, strict=True):
            params, token_ids = live[row]
            output = token_ids[2:]
            for i in range(vocab_size):
                score = before[i] + params.logit_bias.get(i, 0.0)
                if i in params.suppressed and len(output) < params.min_tokens:
                    score = -INF
                if i in token_ids:
                    score = score * params.repetition_penalty if score < 0 else score / params.repetition_penalty
                score -= output.count(i) * params.frequency_penalty + (i in output) * params.presence_penalty
                assert scores[i] == pytest.approx(score, abs=1e-5)


def test_rows_without_penalties_hold_no_counts() -> None:
    sampler = make(1000, [spec(temperature=0.0), spec(top_p=0.5, logit_bias={3: 1.0}, min_tokens=2, suppressed=[1])])
    tokens(sampler, torch.zeros(2, 1000), [0, 1])
    assert len(sampler._penalties._count_NV) == 0


def test_greedy_takes_the_best_score_and_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 100, dtype=torch.bfloat16)
    logits[:, [40, 70]] = 5.0
    logits[1, 90] = 6.0
    sampler = make(
        100,
        [
            spec(temperature=0.0),
            spec(temperature=0.0, logit_bias={90: -2.0, 40: -0.5}),
            spec(temperature=0.0, min_tokens=1, suppressed=[40, 70, 5000], logit_bias={7: 0.5, 5000: 1.0}),
        ],
    )
    kept = logits.clone()
    assert tokens(sampler, logits, [0, 1, 2]) == [40, 70, 7]
    assert torch.equal(logits, kept)
    sampler.append(2, 7)  # min_tokens is reached
    assert tokens(sampler, logits.float(), [0, 1, 2]) == [40, 70, 40]
    assert tokens(sampler, logits[1:2], [1]) == [70]
    assert sampler.sample(logits[:0], []) == []


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(3)) * 30
    sampler = make(300, [spec(temperature=t, seed=5) for t in (1e-300, 1e-40, 1e-6, 1e-3)])
    assert tokens(sampler, logits, range(4)) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("broken", ["nan", "one nan", "-inf", "inf"])
def test_a_broken_row_is_marked_and_harms_no_other(broken: str) -> None:
    vocab_size = 5003
    rng = np.random.default_rng(0)
    specs = [
        spec(temperature=0.0, logprobs=2),
        spec(seed=3, logprobs=1),
        spec(top_k=5, seed=4),
        spec(top_p=0.9, temperature=9.0, seed=5),  # needs the full sort
        spec(top_k=300, top_p=0.9, min_p=0.01, seed=6, repetition_penalty=1.2, presence_penalty=1.0),
    ]
    logits = torch.from_numpy(rng.normal(size=(len(specs), vocab_size)))
    sampler = make(vocab_size, specs)
    want = sampler.sample(logits, range(len(specs)))
    for row in range(len(specs)):
        damaged = logits.clone()
        if broken == "one nan":
            damaged[row, 7] = NAN
        else:
            damaged[row] = {"nan": NAN, "-inf": -INF, "inf": INF}[broken]
        got = sampler.sample(damaged, range(len(specs)))
        assert got[row] == (NO_TOKEN, None)
        assert got[:row] + got[row + 1 :] == want[:row] + want[row + 1 :]


def test_tokens_that_cannot_occur_are_never_sampled() -> None:
    logits = torch.full((64, 400), -INF)
    logits[:, 399] = -3.0
    logits[::2, 0] = -3.0
    specs = [spec(seed=i, top_k=[0, 50][i % 2], top_p=[1.0, 0.9, 0.99][i % 3], temperature=2.0) for i in range(64)]
    got = tokens(make(400, specs), logits, range(64))
    assert set(got[::2]) == {0, 399}
    assert set(got[1::2]) == {399}


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = (torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    best = int(logits[0].argmax())
    sampler = make(
        200,
        [
            spec(temperature=0.0, logit_bias={best: -100.0}, logprobs=5),
            spec(temperature=0.0),
            spec(temperature=0.7, top_k=2, repetition_penalty=1.5, logprobs=0),
        ],
    )
    reference = logits.double().log_softmax(dim=-1)
    (second, biased), (_, absent), (drawn, plain) = sampler.sample(logits, [0, 1, 2])
    assert absent is None
    assert biased is not None
    assert plain is not None
    assert (biased.token_id, biased.rank) == (second, 2)
    assert biased.logprob == pytest.approx(float(reference[0, second]), abs=2e-6)
    assert [token_id for token_id, _ in biased.top] == reference[0].sort(stable=True, descending=True)[1][:5].tolist()
    assert [value for _, value in biased.top] == pytest.approx(
        reference[0].sort(descending=True)[0][:5].tolist(), abs=2e-6
    )
    assert (plain.token_id, plain.top) == (drawn, [])
    assert plain.logprob == pytest.approx(float(reference[2, drawn]), abs=2e-6)
