"""flash_attention on a GPU, through its public functions, against float64 and torch's own attention."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rayllm_kernels import flash_attention, flash_attention_with_lse
from tests.kernels.flash_cases import Answers, Case, by_softmax, check, make_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [64, 80, 96, 128, 256]  # with tiles of their own
RAGGED = [(300, 300), (1, 1), (129, 700), (0, 9), (257, 257), (40, 3)]


def run(case: Case) -> Answers:
    inputs = (case.q.requires_grad_(), case.k.requires_grad_(), case.v.requires_grad_())
    out, lse = flash_attention_with_lse(*inputs, **case.options)  # type: ignore[arg-type]
    dq, dk, dv = case.differentiate(out, lse, inputs)
    return out.detach(), lse.detach(), dq, dk, dv


def check_all(case: Case) -> None:
    exact, low = by_softmax(case, torch.float64), by_softmax(case, case.q.dtype)
    for result, right, rough in zip(run(case), exact, low, strict=True):
        check(result, right, rough, case.q.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 1), (True, 100)])
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 32, 48, 192])
def test_every_shape(head_dim: int, causal: bool, window: int | None, dtype: torch.dtype) -> None:
    check_all(make_case(RAGGED, head_dim=head_dim, causal=causal, window=window, dtype=dtype, device="cuda"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_layouts(head_dim: int, heads: int, kv_heads: int) -> None:
    lengths = [(128, 128), (33, 200)]
    check_all(
        make_case(
            lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16, pads=0, device="cuda"
        )
    )


def test_many_sequences() -> None:
    check_all(make_case([(1 + b % 7, 1 + b % 7) for b in range(300)], dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_attention_gives_the_same(dtype: torch.dtype, head_dim: int) -> None:
    case = make_case([(2000, 2000)], heads=8, head_dim=head_dim, dtype=dtype, pads=0, device="cuda")
    case.dlse.zero_()
    inputs = (case.q.requires_grad_(), case.k.requires_grad_(), case.v.requires_grad_())
    q, k, v = (x.transpose(0, 1)[None] for x in inputs)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale, enable_gqa=True)[0].transpose(0, 1)
    expected = (theirs, *case.differentiate(theirs, None, inputs))
    out, _, *gradients = run(case)
    for x, y in zip((out, *gradients), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * y.abs().max().item())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_same_call_gives_the_same_bits(head_dim: int) -> None:
    case = make_case([(1500, 1500), (700, 900)], heads=8, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    first = run(case)
    for _ in range(5):
        for x, y in zip(run(case), first, strict=True):
            assert torch.equal(x, y)


def test_views_of_a_fused_projection() -> None:
    case = make_case([(300, 300), (1, 1), (257, 257)], dtype=torch.bfloat16, device="cuda")
    expected = run(case)
    fused = torch.cat((case.q, case.k, case.v), dim=1).detach()
    case.q, case.k, case.v = fused.split((4, 2, 2), dim=1)
    for x, y in zip(run(case), expected, strict=True):
        assert torch.equal(x, y)


def test_a_cuda_graph_serves_any_lengths() -> None:
    case = make_case([(300, 300), (1, 1), (699, 699)], dtype=torch.bfloat16, pads=0, device="cuda")
    queries, keys = case.starts
    live = [torch.tensor([0, n, n, 1000], dtype=torch.int32, device="cuda") for n in (5, 5)]
    options = case.options | {"cu_seqlens_q_B1": live[0], "cu_seqlens_k_B1": live[1]}

    def attend() -> tuple[Tensor, Tensor]:
        return flash_attention_with_lse(case.q, case.k, case.v, **options)  # type: ignore[arg-type]

    with torch.no_grad():
        attend()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = attend()
        live[0].copy_(queries)
        live[1].copy_(keys)
        graph.replay()
    exact, low = by_softmax(case, torch.float64), by_softmax(case, case.q.dtype)
    check(out, exact[0], low[0], case.q.dtype)
    check(lse, exact[1], low[1], case.q.dtype)


def test_torch_compile_keeps_it_whole() -> None:
    case = make_case(RAGGED, dtype=torch.bfloat16, device="cuda")
    expected = run(case)
    case.dlse.zero_()
    inputs = (case.q.requires_grad_(), case.k.requires_grad_(), case.v.requires_grad_())
    attend = torch.compile(lambda q, k, v: flash_attention(q * 1, k, v, **case.options) + 0, fullgraph=True)  # type: ignore[arg-type]
    out = attend(*inputs)
    assert torch.equal(out, expected[0])
    for x in case.differentiate(out, None, inputs):
        assert not x.isnan().any()


def test_float32_is_torchs() -> None:
    case = make_case(RAGGED, dtype=torch.float32, device="cuda")
    out = flash_attention(case.q, case.k, case.v, **case.options)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), by_softmax(case, torch.float64)[0], rtol=1e-4, atol=1e-4)
