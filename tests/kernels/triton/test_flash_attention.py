"""The Triton kernels of flash attention in the interpreter, forward and gradients, against float64."""

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rayllm_kernels.gpu import flash_attention
from rayllm_kernels.gpu.flash_attention import Pattern, attend, backward, forward
from rayllm_kernels.gpu.flash_attention_configs import BACKWARD_KV, FORWARD, Tiling, tiling
from tests.kernels.flash_cases import RAGGED, Answers, Case, by_softmax, check, dense, make_case

# numpy says what a GPU does silently with rows that nobody owns, whose results are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALVES = [torch.float16, torch.bfloat16]  # what the kernels ship for; float32 is for checks
SMALL = Tiling(block_m=16, block_n=32, num_warps=4, num_stages=2, tma=False)
DESCRIPTORS = Tiling(block_m=32, block_n=16, num_warps=4, num_stages=2, tma=True)
SPECIALISED = Tiling(block_m=16, block_n=16, num_warps=4, num_stages=2, tma=True, warp_specialize=True)


def run(case: Case, tile: Tiling, kv_tile: Tiling | None = None) -> tuple[Tensor, ...]:
    pattern = Pattern(*case.pattern)
    out, lse = forward(case.q, case.k, case.v, pattern, tile)
    inputs = (case.q, case.k, case.v, out, lse, pattern)
    return out, lse, *backward(case.dout, case.dlse, *inputs, kv_tile or tile, tile)


def answers(case: Case) -> tuple[Answers, Answers]:
    """Exact, and by torch in the case's precision: in bfloat16 `dense` takes seconds, for products of new lengths."""
    low = by_softmax if case.q.dtype == torch.bfloat16 else dense
    return dense(case, torch.float64), low(case, case.q.dtype)


def check_all(case: Case, tile: Tiling, kv_tile: Tiling | None = None) -> None:
    exact, low = answers(case)
    for result, right, rough in zip(run(case, tile, kv_tile), exact, low, strict=True):
        check(result, right, rough, case.q.dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", [SMALL, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 1), (True, 17)])
def test_ragged_sequences(causal: bool, window: int | None, tile: Tiling, dtype: torch.dtype) -> None:
    check_all(make_case(RAGGED, causal=causal, window=window, dtype=dtype), tile)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", [SMALL, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
def test_head_layouts(head_dim: int, heads: int, kv_heads: int, tile: Tiling, dtype: torch.dtype) -> None:
    check_all(make_case([(18, 18), (3, 21)], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype), tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    case = make_case(RAGGED, dtype=dtype)
    check_all(case, tiling(FORWARD, case.q), tiling(BACKWARD_KV, case.q))


@pytest.mark.parametrize("lengths", [[(16, 16), (32, 32)], [(15, 64), (17, 31)]])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_on_and_off_the_tile(lengths: list[tuple[int, int]], causal: bool) -> None:
    check_all(make_case(lengths, heads=2, kv_heads=1, causal=causal, pads=0), SMALL, DESCRIPTORS)


@pytest.mark.parametrize("count", [15, 16, 40])
def test_more_sequences_than_a_program_looks_at_at_once(count: int) -> None:
    lengths = [(b % 3, b % 4 + 1) for b in range(count)]
    check_all(make_case(lengths, heads=1, kv_heads=1, head_dim=16), SMALL)


def test_the_specialised_form_refuses_more_sequences_than_it_compiles_for() -> None:
    case = make_case([(1, 1)] * 64, heads=1, kv_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="64 sequences: the specialized form takes less than 64"):
        forward(case.q, case.k, case.v, Pattern(*case.pattern), SPECIALISED)


@pytest.mark.parametrize("tile", [SMALL, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_that_see_nothing_give_zeros(causal: bool, tile: Tiling) -> None:
    check_all(make_case([(20, 3), (4, 0), (0, 6), (2, 2)], heads=2, kv_heads=1, causal=causal), tile)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 9)])
def test_the_specialised_form(causal: bool, window: int | None, dtype: torch.dtype) -> None:
    """Its single loop masks every tile. It may read the next sequence's values, so nothing is poisoned here."""
    case = make_case(RAGGED, causal=causal, window=window, dtype=dtype, pads=0)
    out, lse = forward(case.q, case.k, case.v, Pattern(*case.pattern), SPECIALISED)
    exact, low = answers(case)
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


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[TensorDescriptor]:
    """Those that are made, each held to what the driver asks for (CUDA's `cuTensorMapEncodeTiled`)."""
    made = []

    def describe(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
        assert x.data_ptr() % 16 == 0
        for size, stride, outer in zip(shape[1:], strides[1:], strides[:-1], strict=True):
            assert outer * x.element_size() % 16 == 0
            assert outer >= size * stride
        made.append(TensorDescriptor(x, shape, strides, block))
        return made[-1]

    monkeypatch.setattr(flash_attention, "TensorDescriptor", describe)
    return made


@pytest.mark.parametrize("how", ["one row for all", "one token of that", "one head for all", "not aligned"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_what_no_descriptor_takes_is_copied(how: str, head_dim: int, descriptors: list[TensorDescriptor]) -> None:
    tokens = 1 if how == "one token of that" else 20
    case = make_case([(tokens, tokens)], heads=2, kv_heads=2, head_dim=head_dim, dtype=torch.float16, pads=0)
    rows = case.dout.shape[0]
    if how == "one head for all":
        case.dout = case.dout[:, :1].expand(-1, 2, -1)
    elif how == "not aligned":
        case.dout = torch.cat((case.dout.new_zeros(1), case.dout.flatten()))[1:].view(rows, 2, head_dim)
    else:
        case.dout = case.dout[:1].expand(40, -1, -1)[:rows]
    check_all(case, DESCRIPTORS)
    assert len(descriptors) == 3 + 2 * 4


def test_gradients_are_those_of_the_result() -> None:
    """The kernel against finite differences of itself: float32, so steps are wide and the bound is loose."""
    case = make_case([(5, 5), (2, 4)], heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, pads=0)
    inputs = tuple(x.requires_grad_() for x in (case.q, case.k, case.v))

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, *case.pattern)
        return out, lse

    with pytest.warns(UserWarning, match="not a double precision"):
        assert torch.autograd.gradcheck(both, inputs, eps=1e-2, atol=1e-3, rtol=1e-2, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("window", [None, 7])
def test_registration(window: int | None) -> None:
    """torch's own checks: schema, fake tensors, autograd, and tracing with symbolic shapes."""
    case = make_case([(9, 9), (3, 8)], heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, window=window, pads=0)
    inputs = tuple(x.requires_grad_() for x in (case.q, case.k, case.v))
    torch.library.opcheck(attend, (*inputs, *case.pattern))


def test_nothing_to_attend_to() -> None:
    case = make_case([(0, 4)], pads=0)
    out, lse = attend(case.q, case.k, case.v, *case.pattern)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)
    case = make_case([(3, 0)], pads=0)
    out, lse = attend(case.q, case.k, case.v, *case.pattern)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_a_sequence_gives_the_same_bits_wherever_it_lies() -> None:
    """Nothing adds up across sequences, and each gradient in one order."""
    lengths, tiles = [(37, 37), (5, 40), (33, 33)], (SMALL, DESCRIPTORS)
    case = make_case(lengths, pads=0)
    moved = make_case(lengths[::-1], pads=0)
    for name in ("q", "k", "v", "dout"):
        x = getattr(case, name)
        sizes = [n[name in "kv"] for n in lengths]
        setattr(moved, name, torch.cat(x.split(sizes)[::-1]))
    moved.dlse = torch.cat(case.dlse.split([n for n, _ in lengths], dim=1)[::-1], dim=1)
    out, lse, dq, dk, dv = run(case, *tiles)
    ours = (out, lse.T, dq, dk, dv)
    out, lse, dq, dk, dv = run(moved, *tiles)
    for x, y, side in zip(ours, (out, lse.T, dq, dk, dv), (0, 0, 0, 1, 1), strict=True):
        sizes = [n[side] for n in lengths]
        assert torch.equal(x, torch.cat(y.split(sizes[::-1])[::-1]))


@pytest.mark.parametrize("loss_of", ["out", "lse", "both"])
def test_gradients_of_the_operator(loss_of: str) -> None:
    """With the tiles that ship, through autograd, which knows no gradient of what the loss does not have."""
    case = make_case(RAGGED, pads=0)
    inputs = (case.q.requires_grad_(), case.k.requires_grad_(), case.v.requires_grad_())
    out, lse = attend(*inputs, *case.pattern)
    if loss_of == "lse":
        case.dout.zero_()
        gradients = torch.autograd.grad(lse, inputs, case.dlse)
    elif loss_of == "out":
        case.dlse.zero_()
        gradients = torch.autograd.grad(out, inputs, case.dout)
    else:
        gradients = torch.autograd.grad((out, lse), inputs, (case.dout, case.dlse))
    exact, low = answers(case)
    for result, right, rough in zip((out, lse, *gradients), exact, low, strict=True):
        check(result, right, rough, case.q.dtype)
