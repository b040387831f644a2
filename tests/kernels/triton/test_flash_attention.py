"""The Triton kernels of flash attention in the interpreter, against attention in float64, one query at a time.

Tolerance: FlashAttention's own rule. The error may be at most twice that of the same maths by torch in the low
precision, plus a few roundings of outputs of order one.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rayllm_kernels.flash_attention import flash_attention_reference
from rayllm_kernels.gpu.flash_attention import PORTABLE, Tiling, attend, backward, forward

# numpy says what a GPU does silently with rows that nobody owns, whose results are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ROUNDING = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SMALL = Tiling(block_m=16, block_n=32, num_warps=4, num_stages=2, tma=False)
DESCRIPTORS = Tiling(block_m=32, block_n=16, num_warps=4, num_stages=2, tma=True)
SPECIALISED = Tiling(block_m=16, block_n=16, num_warps=4, num_stages=2, tma=True, warp_specialize=True)


@dataclass(kw_only=True)
class Case:
    """Packed inputs, with unowned rows behind them, and gradients for what comes out."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    starts: tuple[Tensor, Tensor]
    causal: bool
    window: int | None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[2])

    @property
    def arguments(self) -> tuple[object, ...]:
        return *self.starts, self.scale, self.causal, self.window


def make_case(
    lengths: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    causal: bool = True,
    window: int | None = None,
    dtype: torch.dtype = torch.float16,
    pads: int = 3,
) -> Case:
    """`lengths`: (queries, keys) of each sequence."""
    torch.manual_seed(heads * 100 + head_dim + len(lengths))
    queries, keys = ([0, *torch.tensor(x).cumsum(0).tolist()] for x in zip(*lengths, strict=True))

    def packed(rows: int, count: int) -> Tensor:
        x = torch.randn(rows + pads, count, head_dim).to(dtype)
        x[rows:] = torch.nan  # nobody's rows may reach a result
        return x

    return Case(
        q=packed(queries[-1], heads),
        k=packed(keys[-1], kv_heads),
        v=packed(keys[-1], kv_heads),
        dout=packed(queries[-1], heads),
        dlse=torch.randn(heads, queries[-1] + pads),
        starts=(torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32)),
        causal=causal,
        window=window,
    )


def dense(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) by the softmax's definition, one query and head at a time, wholly in `dtype`."""
    q, k, v = (x.to(dtype).nan_to_num().requires_grad_() for x in (case.q, case.k, case.v))
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=dtype)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype)
    for b in range(case.starts[0].shape[0] - 1):
        (q_start, q_stop), (k_start, k_stop) = (x[b : b + 2].tolist() for x in case.starts)
        for i in range(q_start, q_stop):
            at = k_stop - k_start - (q_stop - i)
            last = at + 1 if case.causal else k_stop - k_start
            first = 0 if case.window is None else max(0, at - case.window + 1)
            if last <= first:
                continue
            for h in range(q.shape[1]):
                sees = slice(k_start + first, k_start + last)
                scores = (k[sees, h // group] @ q[i, h]) * case.scale
                out[i, h] = scores.softmax(0) @ v[sees, h // group]
                lse[h, i] = scores.logsumexp(0)
    owned = lse > -torch.inf
    loss = (out * case.dout.nan_to_num().to(dtype)).sum() + (lse[owned] * case.dlse[owned].to(dtype)).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v), allow_unused=False)


def check(result: Tensor, exact: Tensor, low: Tensor, dtype: torch.dtype) -> None:
    assert not result.isnan().any()
    finite = exact > -torch.inf
    assert torch.equal(result > -torch.inf, finite)
    error = (result.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    of_torch = (low.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    assert error <= 2 * of_torch + ROUNDING[dtype] * max(1.0, exact[finite].abs().max().item() if finite.any() else 0.0)


def run(case: Case, tile: Tiling, kv_tile: Tiling | None = None) -> tuple[Tensor, ...]:
    out, lse = forward(case.q, case.k, case.v, *case.arguments, tile)  # type: ignore[arg-type]
    tiles = kv_tile or tile, tile
    inputs = (case.q, case.k, case.v, out, lse, *case.arguments)
    return out, lse, *backward(case.dout, case.dlse, *inputs, *tiles)  # type: ignore[arg-type]


def check_all(case: Case, tile: Tiling, kv_tile: Tiling | None = None) -> None:
    exact, low = dense(case, torch.float64), dense(case, case.q.dtype)
    for result, right, rough in zip(run(case, tile, kv_tile), exact, low, strict=True):
        check(result, right, rough, case.q.dtype)


RAGGED = [(37, 37), (1, 1), (5, 40), (33, 33)]


@pytest.mark.parametrize("tile", [SMALL, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 1), (True, 17)])
def test_ragged_sequences(causal: bool, window: int | None, tile: Tiling) -> None:
    check_all(make_case(RAGGED, causal=causal, window=window), tile)


@pytest.mark.parametrize("tile", [SMALL, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
def test_head_layouts(head_dim: int, heads: int, kv_heads: int, tile: Tiling) -> None:
    check_all(make_case([(18, 18), (3, 21)], heads=heads, kv_heads=kv_heads, head_dim=head_dim), tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    check_all(make_case(RAGGED, dtype=dtype), PORTABLE)


@pytest.mark.parametrize("lengths", [[(16, 16), (32, 32)], [(15, 64), (17, 31)]])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_on_and_off_the_tile(lengths: list[tuple[int, int]], causal: bool) -> None:
    check_all(make_case(lengths, heads=2, kv_heads=1, causal=causal, pads=0), SMALL, DESCRIPTORS)


@pytest.mark.parametrize("tile", [SMALL, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_that_see_nothing_give_zeros(causal: bool, tile: Tiling) -> None:
    check_all(make_case([(20, 3), (4, 0), (0, 6), (2, 2)], heads=2, kv_heads=1, causal=causal), tile)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 9)])
def test_the_specialised_form(causal: bool, window: int | None) -> None:
    """Its single loop masks every tile. It may read the next sequence's values, so nothing is poisoned here."""
    case = make_case(RAGGED, causal=causal, window=window, pads=0)
    out, lse = forward(case.q, case.k, case.v, *case.arguments, SPECIALISED)  # type: ignore[arg-type]
    exact, low = dense(case, torch.float64), dense(case, case.q.dtype)
    check(out, exact[0], low[0], case.q.dtype)
    check(lse, exact[1], low[1], case.q.dtype)


def test_large_scores_do_not_overflow() -> None:
    """Scores past 100, where e**score is no float32. (At 1000 float32 inputs break the rule: the log-sum-exp is then
    known to 6e-5, and with it the weights of the backward pass.)"""
    case = make_case([(40, 40)])
    case.q *= 30
    check_all(case, SMALL)


def test_a_sequence_does_not_see_its_neighbours_infinities() -> None:
    case = make_case([(20, 20), (20, 20)], pads=0)
    clean = run(case, DESCRIPTORS)
    for x in (case.q, case.k, case.v, case.dout):
        x[20:] = torch.inf
    for result, expected in zip(run(case, DESCRIPTORS), clean, strict=True):
        rows = (slice(None), slice(0, 20)) if result.dim() == 2 else slice(0, 20)
        assert torch.equal(result[rows], expected[rows])


def test_views_of_a_fused_projection() -> None:
    case = make_case([(37, 37), (33, 33)], heads=4, kv_heads=2)
    expected = run(case, DESCRIPTORS)
    fused = torch.cat((case.q, case.k, case.v), dim=1)
    case.q, case.k, case.v = fused.split((4, 2, 2), dim=1)
    case.dout = case.dout.transpose(0, 1).contiguous().transpose(0, 1)
    for result, right in zip(run(case, DESCRIPTORS), expected, strict=True):
        assert torch.equal(result, right)


def test_gradients_are_those_of_the_result() -> None:
    """The kernel against finite differences of itself: float32, so steps are wide and the bound is loose."""
    case = make_case([(5, 5), (2, 4)], heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, pads=0)
    inputs = tuple(x.requires_grad_() for x in (case.q, case.k, case.v))

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, *case.arguments)
        return out, lse

    with pytest.warns(UserWarning, match="not a double precision"):
        assert torch.autograd.gradcheck(both, inputs, eps=1e-2, atol=1e-3, rtol=1e-2, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("window", [None, 7])
def test_registration(window: int | None) -> None:
    """torch's own checks: schema, fake tensors, autograd, and tracing with symbolic shapes."""
    case = make_case([(9, 9), (3, 8)], heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, window=window, pads=0)
    inputs = tuple(x.requires_grad_() for x in (case.q, case.k, case.v))
    torch.library.opcheck(attend, (*inputs, *case.arguments))


def test_nothing_to_attend_to() -> None:
    case = make_case([(0, 4)], pads=0)
    out, lse = attend(case.q, case.k, case.v, *case.arguments)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)
    case = make_case([(3, 0)], pads=0)
    out, lse = attend(case.q, case.k, case.v, *case.arguments)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_the_reference_agrees_in_float64() -> None:
    case = make_case(RAGGED, dtype=torch.float64, window=17, pads=0)
    queries, keys = case.starts
    out, lse = flash_attention_reference(
        case.q,
        case.k,
        case.v,
        cu_seqlens_q_B1=queries,
        cu_seqlens_k_B1=keys,
        scale=case.scale,
        causal=True,
        window=17,
    )
    exact = dense(case, torch.float64)
    torch.testing.assert_close(out, exact[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, exact[1], rtol=1e-12, atol=1e-12)
