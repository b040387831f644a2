"""Packed sequences in the dense context: each as if it were alone, against one masked attention in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rayllm.models.context import DenseContext

LENGTHS = (1, 7, 0, 29, 12)
CU_SEQLENS = [0, 1, 8, 8, 37, 49]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(49, heads, 16, generator=generator, dtype=torch.float64) for heads in (6, 2, 2))
    return q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()


def attend(context: DenseContext, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    return context.attend(0, q, k, v, None, scale=0.3, window=window)


def masked_at_once(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """All sequences in one matrix of scores."""
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    at = torch.arange(len(document))
    back = at[:, None] - at[None, :]
    visible = (document[:, None] == document[None, :]) & (back >= 0) & (back < (window or 99))
    k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    scores = torch.einsum("qhe,khe->hqk", q, k) * 0.3
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 9, 29])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_sequences_and_their_gradients(dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    ours, exact = inputs(dtype), inputs(torch.float64)
    out, expected = attend(DenseContext(CU_SEQLENS), *ours, window), masked_at_once(*exact, window)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (out.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 9])
def test_a_sequence_gives_the_same_bits_alone(window: int | None) -> None:
    packed, context = inputs(torch.float32), DenseContext(CU_SEQLENS)
    out = attend(context, *packed, window)
    out.sum().backward()
    bounds = [(start, stop) for start, stop in pairwise(CU_SEQLENS) if start < stop]
    for start, stop in bounds:
        alone = [x.detach()[start:stop].clone().requires_grad_() for x in packed]
        q, k, v = alone
        result = attend(DenseContext([0, stop - start]), q, k, v, window)
        result.sum().backward()
        assert torch.equal(result, out[start:stop])
        for x, y in zip(alone, packed, strict=True):
            assert x.grad is not None
            assert y.grad is not None
            assert torch.equal(x.grad, y.grad[start:stop])


def test_positions_begin_anew_in_each_sequence() -> None:
    context = DenseContext(CU_SEQLENS)
    assert context.positions_T.tolist() == [i for length in LENGTHS for i in range(length)]
    assert context.rope_lengths_T is not None
    assert context.rope_lengths_T.tolist() == [length for length in LENGTHS for _ in range(length)]


@pytest.mark.parametrize("window", [None, 1, 9, 29])
def test_tokens_that_two_sequences_share(window: int | None) -> None:
    """As if each borrower had a copy of them, whose gradients the lender gets too."""
    cu_seqlens, prefixes = [0, 1, 8, 37, 49], [0, 1, 0, 23]
    tokens = [0, *range(8), *range(8, 37), *range(8, 31), *range(37, 49)]
    own = [0, *range(2, 9), *range(9, 38), *range(61, 73)]
    shared, copied = inputs(torch.float64), inputs(torch.float64)
    context = DenseContext(cu_seqlens, prefixes)
    out = attend(context, *shared, window)
    copies = [x[tokens] for x in copied]
    q, k, v = copies
    expected = attend(DenseContext([0, 1, 9, 38, 73]), q, k, v, window)[own]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(shared, copied, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    assert context.positions_T.tolist() == [0, *range(1, 8), *range(29), *range(23, 35)]
    assert context.rope_lengths_T is not None
    assert context.rope_lengths_T.tolist() == [8] * 8 + [35] * 41


@pytest.mark.parametrize("cu_seqlens", [[], [0], [1, 5], [0, 5, 4]])
def test_bounds_that_are_none(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        DenseContext(cu_seqlens)


def test_tokens_past_the_last_sequence() -> None:
    with pytest.raises(ValueError, match="49 tokens came to a context of 37"):
        attend(DenseContext(CU_SEQLENS[:-1]), *inputs(torch.float32), None)
