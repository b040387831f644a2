import math

import pytest
import torch
from torch import Tensor

from rayllm.engine import logprobs
from rayllm.engine.order_keys import best_keys, token_ids
from rayllm.engine.sampler import Sampler


def tied_logits(rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """bfloat16 logits: with 8 bits of mantissa equal values are common, also among the best."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab_size, generator=generator) * 3).bfloat16()


def order(row: Tensor) -> list[int]:
    values = row.double().tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@pytest.mark.parametrize(
    ("vocab_size", "size"), [(1, 1), (33, 33), (1000, 7), (1000, 8), (5003, 20), (5003, 128), (20_011, 128)]
)
def test_best_keys_order_by_logit_then_by_id(vocab_size: int, size: int) -> None:
    logits = tied_logits(5, vocab_size).float()
    logits[1] = 0.0  # all equal
    logits[2, ::2] = -0.0
    logits[3, : vocab_size // 2] = float("-inf")
    logits[4] = torch.arange(vocab_size).flip(0) // 3  # the best ones lie together
    got = token_ids(best_keys(logits, size)).tolist()
    assert got == [order(row)[:size] for row in logits]


def test_prompt_logprobs_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 1000 * 3)  # 11 rows: chunks of 3, the last one odd
    logits = tied_logits(11, 1000)
    targets = [0, 999, 5, *(int(row.argmax()) for row in logits[3:])]
    sampler = Sampler(vocab_size=1000, max_rows=1, device=torch.device("cpu"))
    got = sampler.prompt_logprobs(logits, targets, 4)
    reference = logits.double().log_softmax(dim=-1)
    assert len(got) == 11
    for position, row, logit_row, target in zip(got, reference, logits, targets, strict=True):
        assert position.token_id == target
        assert position.logprob == pytest.approx(float(row[target]), abs=2e-6)
        assert position.rank == 1 + int((logit_row > logit_row[target]).sum())
        assert [token_id for token_id, _ in position.top] == order(logit_row)[:4]
        assert [value for _, value in position.top] == pytest.approx(
            [float(row[token_id]) for token_id, _ in position.top], abs=2e-6
        )
    assert [position.rank for position in got[3:]] == [1] * 8


def test_asked_tokens_follow_the_likeliest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 1000 * 2)
    logits = tied_logits(5, 1000)
    num_top, asked = [0, 3, 1, 0, 2], [[7], [], [999, 0, 999], [5, 6], [1]]
    targets = torch.arange(5)
    got = logprobs.position_logprobs(logits, targets, num_top, asked)
    reference = logits.double().log_softmax(dim=-1)
    for position, row, logit_row, n, ids in zip(got, reference, logits, num_top, asked, strict=True):
        assert [token_id for token_id, _ in position.top] == order(logit_row)[:n] + ids
        assert [value for _, value in position.top] == pytest.approx(
            [float(row[token_id]) for token_id, _ in position.top], abs=2e-6
        )


def test_prompt_logprobs_edges() -> None:
    sampler = Sampler(vocab_size=6, max_rows=1, device=torch.device("cpu"))
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 3.0, 2.0, 1.0], [float("nan")] * 6])
    impossible, broken = sampler.prompt_logprobs(logits, [2, 0], 20)  # more alternatives than the vocabulary has
    assert impossible.logprob == float("-inf")
    assert impossible.rank == 6
    assert [token_id for token_id, _ in impossible.top] == [3, 4, 1, 5, 0, 2]
    assert math.isnan(broken.logprob)
    assert sampler.prompt_logprobs(logits, [3, 3], 0)[0].top == []
    assert sampler.prompt_logprobs(logits[:0], [], 3) == []
