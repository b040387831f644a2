"""paged_attention and store_kv on a GPU, through their public functions, against float64 and torch's own attention."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rayllm_kernels import paged_attention, store_kv, store_kv_reference
from tests.kernels.paged_cases import PagedCase, make_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MIXED = [(1, 3000), (1, 1), (300, 300), (3, 40), (1, 17), (129, 700), (0, 9)]
STEPS = [(1, 5000), (1, 1), (1, 16), (1, 700), (1, 129)]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def attend(case: PagedCase, out: Tensor, q_THE: Tensor | None = None) -> Tensor:
    return paged_attention(
        case.q_THE if q_THE is None else q_THE,
        case.k_cache,
        case.v_cache,
        block_tables_RM=case.block_tables_RM,
        rows_B=case.rows_B,
        query_start_B1=case.query_start_B1,
        context_lens_B=case.context_lens_B,
        scale=case.scale,
        window=case.window,
        k_scales_NPK=case.k_scales,
        v_scales_NPK=case.v_scales,
        out=out,
    )


def check(case: PagedCase) -> None:
    case.check(attend(case, torch.full_like(case.q_THE, math.nan)))


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", [STEPS, MIXED], ids=["decode", "mixed"])
def test_every_shape(
    lengths: list[tuple[int, int]], head_dim: int, dtype: torch.dtype, int8: bool, window: int | None
) -> None:
    cache_dtype = torch.int8 if int8 else dtype
    check(
        make_case(
            lengths,
            heads=8,
            kv_heads=2,
            head_dim=head_dim,
            dtype=dtype,
            cache_dtype=cache_dtype,
            window=window,
            device="cuda",
        )
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (40, 1), (8, 1)])
@pytest.mark.parametrize("page", [1, 7, 16, 256])
def test_head_layouts_and_pages(page: int, heads: int, kv_heads: int) -> None:
    for lengths in (STEPS, MIXED):
        check(make_case(lengths, heads=heads, kv_heads=kv_heads, page=page, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("sequences", [1, 2, 5, 12, 13, 64, 200])
def test_no_batch_size_is_special(sequences: int) -> None:
    check(
        make_case(
            [(1, 100 + 37 * b) for b in range(sequences)], heads=8, kv_heads=2, dtype=torch.bfloat16, device="cuda"
        )
    )


def test_the_same_call_gives_the_same_bits() -> None:
    case = make_case(MIXED, dtype=torch.bfloat16, device="cuda")
    first = attend(case, torch.empty_like(case.q_THE)).clone()
    for _ in range(5):
        assert torch.equal(attend(case, torch.empty_like(case.q_THE)), first)


def test_torch_attention_gives_the_same() -> None:
    case = make_case([(700, 700)], heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    blocks = case.block_tables_RM[case.rows_B[0].long(), : -(-700 // 16)].long()
    k, v = (cache[blocks].flatten(0, 1)[:700].transpose(0, 1)[None] for cache in (case.k_cache, case.v_cache))
    q = case.q_THE.transpose(0, 1)[None]
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale, enable_gqa=True)[0]
    ours = attend(case, torch.empty_like(case.q_THE))
    torch.testing.assert_close(ours, theirs.transpose(0, 1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("int8", [False, True])
def test_a_cuda_graph_serves_any_lengths(int8: bool) -> None:
    """Captured with short contexts, replayed with long ones that are split, in the same tensors."""
    settings = {"heads": 8, "kv_heads": 2, "dtype": torch.bfloat16, "cache_dtype": torch.int8 if int8 else None}
    case = make_case([(1, 5000), (1, 3), (1, 900)], device="cuda", **settings)  # type: ignore[arg-type]
    live = dataclasses.replace(case, context_lens_B=torch.full_like(case.context_lens_B, 1))
    out = torch.empty_like(case.q_THE)
    attend(live, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(live, out)
    live.context_lens_B.copy_(case.context_lens_B)
    out.fill_(math.nan)
    graph.replay()
    case.check(out)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # which torch itself uses
def test_torch_compile_keeps_it_whole() -> None:
    case = make_case(STEPS, dtype=torch.bfloat16, device="cuda")
    out = torch.full_like(case.q_THE, math.nan)
    compiled = torch.compile(lambda q: attend(case, out, q * 1) + 0, fullgraph=True)
    case.check(compiled(case.q_THE))


@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim"), [(0, 2, 64), (1, 8, 128), (33, 3, 80), (500, 1, 256)])
def test_store(tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Bit by bit, and nothing beside the slots."""
    qkv = torch.randn(tokens, 4 * kv_heads, head_dim, device="cuda").to(dtype)
    k, v = qkv[:, 2 * kv_heads : 3 * kv_heads], qkv[:, 3 * kv_heads :]
    k[:1, :1] = 0
    slots = torch.randperm(90 * 7, device="cuda")[:tokens]
    results = []
    for store in (store_kv, store_kv_reference):
        caches = [torch.zeros(90, 7, kv_heads, head_dim, dtype=cache_dtype, device="cuda") for _ in range(2)]
        scales = [torch.full((90, 7, kv_heads), -1.0, device="cuda") for _ in range(2)]
        store(k, v, *caches, slots, *(scales if cache_dtype == torch.int8 else (None, None)))
        results.append([*caches, *scales])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
