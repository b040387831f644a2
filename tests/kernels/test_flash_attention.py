"""flash_attention by torch, which serves CPU: against float64 query by query, and its gradients by differences."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayllm_kernels import flash_attention, flash_attention_reference, flash_attention_with_lse
from tests.kernels.flash_cases import RAGGED, Case, by_softmax, check, dense, make_case

BLIND = [(20, 3), (4, 0), (0, 6), (2, 2)]  # queries before the first key


def leaves(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return case.q.requires_grad_(), case.k.requires_grad_(), case.v.requires_grad_()


@pytest.mark.parametrize("lengths", [RAGGED, BLIND])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 1), (True, 17)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_result_and_gradients(
    dtype: torch.dtype, tolerance: float, causal: bool, window: int | None, lengths: list[tuple[int, int]]
) -> None:
    case = make_case(lengths, head_dim=16, causal=causal, window=window, dtype=dtype)
    inputs = leaves(case)
    out = flash_attention(*inputs, **case.options)  # type: ignore[arg-type]
    assert out.dtype == dtype
    case.dlse.zero_()
    exact_out, _, *exact = dense(case, torch.float64)
    torch.testing.assert_close(out.double(), exact_out, rtol=tolerance, atol=tolerance)
    for gradient, right in zip(case.differentiate(out, None, inputs), exact, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "lengths", [RAGGED, BLIND, [(32, 32), (64, 64), (31, 31)], [(32, 33), (1, 64), (31, 94), (33, 64)]]
)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 1), (True, 17), (True, 34)])
def test_bfloat16(causal: bool, window: int | None, lengths: list[tuple[int, int]]) -> None:
    case = make_case(lengths, head_dim=16, causal=causal, window=window, dtype=torch.bfloat16)
    inputs = leaves(case)
    out = flash_attention(*inputs, **case.options)  # type: ignore[arg-type]
    case.dlse.zero_()
    exact, low = dense(case, torch.float64), by_softmax(case, torch.bfloat16)
    ours = (out, *case.differentiate(out, None, inputs))
    for result, right, of_torch in zip(ours, (exact[0], *exact[2:]), (low[0], *low[2:]), strict=True):
        check(result, right, of_torch, torch.bfloat16)


@pytest.mark.parametrize("before", [0, 2], ids=["own keys alone", "twice as many before them"])
def test_memory_does_not_grow_with_the_lengths_met(before: int) -> None:
    """In a process of its own, for what is kept is kept for good."""
    script = (
        "import torch; from rayllm_kernels import flash_attention\n"
        "torch.set_num_threads(1)\n"
        "def attend(length):\n"
        f"    lengths = (length, {1 + before} * length)\n"
        "    q, k = (torch.randn(n, 4, 32, dtype=torch.bfloat16, requires_grad=True) for n in lengths)\n"
        "    queries, keys = (torch.tensor([0, len(x)], dtype=torch.int32) for x in (q, k))\n"
        "    flash_attention(q, k, k, cu_seqlens_q_B1=queries, cu_seqlens_k_B1=keys, scale=0.2).sum().backward()\n"
        "def megabytes(): return int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "for length in range(32, 513, 32): attend(length)\n"
        "before = megabytes()\n"
        "for length in range(1, 513, 4): attend(length)\n"
        "print(megabytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


@pytest.mark.parametrize("lengths", [RAGGED, BLIND])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 17)])
def test_the_reference_and_what_stands_for_it_on_a_gpu(
    causal: bool, window: int | None, lengths: list[tuple[int, int]]
) -> None:
    case = make_case(lengths, head_dim=16, causal=causal, window=window, dtype=torch.float64)
    inputs, exact = leaves(case), dense(case, torch.float64)
    out, lse = flash_attention_reference(*inputs, **case.options)  # type: ignore[arg-type]
    ours = (out, lse, *case.differentiate(out, lse, inputs))
    for result, vectorized, right in zip(ours, by_softmax(case, torch.float64), exact, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(vectorized, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3)])
def test_gradcheck(causal: bool, window: int | None, of_lse: bool) -> None:
    case = make_case(
        [(4, 4), (2, 5)], heads=2, kv_heads=1, head_dim=8, causal=causal, window=window, dtype=torch.float64, pads=0
    )
    op = flash_attention_with_lse if of_lse else flash_attention
    assert torch.autograd.gradcheck(lambda *inputs: op(*inputs, **case.options), leaves(case))  # type: ignore[operator]


def test_log_sum_exp_of_parts_merges_them() -> None:
    """What the log-sum-exp is for: attention over two halves of the keys makes that over all."""
    case = make_case([(5, 40)], causal=False, dtype=torch.float64, pads=0)
    whole, _ = flash_attention_with_lse(case.q, case.k, case.v, **case.options)  # type: ignore[arg-type]
    queries, _ = case.starts
    parts = []
    for keys in (slice(0, 13), slice(13, 40)):
        k, v = case.k[keys], case.v[keys]
        ends = torch.tensor([0, len(k)], dtype=torch.int32)
        parts.append(
            flash_attention_with_lse(
                case.q, k, v, cu_seqlens_q_B1=queries, cu_seqlens_k_B1=ends, scale=case.scale, causal=False
            )
        )
    (left, left_lse), (right, right_lse) = parts
    share = (left_lse - torch.logaddexp(left_lse, right_lse)).exp().transpose(0, 1).unsqueeze(-1)
    torch.testing.assert_close(share * left + (1 - share) * right, whole, rtol=1e-12, atol=1e-12)


def test_no_sequence_gives_zeros() -> None:
    nothing = torch.zeros(1, dtype=torch.int32)
    q = torch.full((3, 2, 8), torch.nan)
    for op in (flash_attention_reference, flash_attention_with_lse):
        out, lse = op(q, q, q, cu_seqlens_q_B1=nothing, cu_seqlens_k_B1=nothing, scale=1.0, causal=True, window=None)
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(lse, torch.full((2, 3), -torch.inf))
    out = flash_attention(q, q, q, cu_seqlens_q_B1=nothing, cu_seqlens_k_B1=nothing, scale=1.0)
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(10, 2, 32)}, "k and v must have one shape"),
        ({"q": torch.zeros(10, 3, 16)}, "3 query heads cannot share 2 kv heads"),
        ({"q": torch.zeros(10, 4, 16, dtype=torch.float16)}, "one dtype"),
        ({"cu_seqlens_k_B1": torch.tensor([0, 4, 10], dtype=torch.int32)}, "of the same sequences"),
        ({"cu_seqlens_q_B1": torch.tensor([0, 10])}, "must be int32"),
        ({"scale": 0.0}, "scale of attention must be positive"),
        ({"window": 0}, "window=0"),
        ({"window": 4, "causal": False}, "causal=False"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(10, 4, 16),
        "k": torch.zeros(10, 2, 16),
        "v": torch.zeros(10, 2, 16),
        "cu_seqlens_q_B1": torch.tensor([0, 10], dtype=torch.int32),
        "cu_seqlens_k_B1": torch.tensor([0, 10], dtype=torch.int32),
        "scale": 0.25,
        "causal": True,
        "window": None,
    } | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, **arguments)  # type: ignore[arg-type]


def test_gradients_are_as_long_as_their_sequences() -> None:
    """What a backward pass makes of 32 sequences is no more than what it makes of one as long as all of them; the
    gradient of a slice would be as long as everything, so 32 times as much."""

    def made(lengths: list[tuple[int, int]]) -> int:
        case = make_case(lengths, head_dim=16, pads=0)
        out = flash_attention(*leaves(case), **case.options)  # type: ignore[arg-type]
        with _Made() as made:
            out.sum().backward()
        return made.elements

    assert made([(16, 16)] * 32) < 1.5 * made([(512, 512)])


class _Made(TorchDispatchMode):
    """Counts the elements of all results that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result
