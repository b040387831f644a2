"""Cases of attention over pages: poisoned caches that hold random sequences, and the answer in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNUSED_BLOCK = 2**30  # far outside of any cache: to read it is a fault


@dataclass(frozen=True, kw_only=True)
class PagedCase:
    """`k_scales`, `v_scales`: None unless the caches are int8. `rounded_THE`: the same maths by torch, in q's dtype."""

    q_THE: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    block_tables_RM: Tensor
    rows_B: Tensor
    query_start_B1: Tensor
    context_lens_B: Tensor
    scale: float
    window: int | None
    expected_THE: Tensor
    rounded_THE: Tensor

    def check(self, out_THE: Tensor) -> None:
        """As FlashAttention's own tests: an error of at most twice that of torch, plus rounding of the result."""
        expected = self.expected_THE.to(out_THE.device)
        allowed = 2 * (self.rounded_THE.double() - self.expected_THE).abs().max().item()
        allowed += 2 * torch.finfo(out_THE.dtype).eps * self.expected_THE.abs().max().item()
        error = (out_THE.double() - expected).abs().max().item()  # NaN, the poison, fails
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def dense_attention(q_SHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, scale: float, window: int | None) -> Tensor:
    """Queries are the last of the keys' tokens; all in the dtype of q."""
    length, group, context = q_SHE.shape[0], q_SHE.shape[1] // k_SKE.shape[1], k_SKE.shape[0]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k_SKE, v_SKE))
    scores = (q_SHE.transpose(0, 1) @ k.transpose(1, 2)) * scale
    at = torch.arange(context - length, context, device=q_SHE.device)[:, None]
    key = torch.arange(context, device=q_SHE.device)[None, :]
    hidden = key > at if window is None else (key > at) | (key <= at - window)
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(0, 1)


def quantize_heads(x_TKE: Tensor) -> tuple[Tensor, Tensor]:
    """int8 by the largest value of each token and head -> (values, scales)."""
    scales = x_TKE.abs().amax(-1).float() / 127
    return (x_TKE.float() / scales[..., None]).round().to(torch.int8), scales


def make_case(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    page: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    spread: float = 1.0,
    device: str = "cpu",
) -> PagedCase:
    """`lengths`: (queries, context) of each sequence; `spread` multiplies the scores."""
    cache_dtype = cache_dtype or dtype
    generator = torch.Generator(device).manual_seed(len(lengths) * 1000 + heads + head_dim)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    num_blocks = [-(-context // page) for _, context in lengths]
    order = torch.randperm(sum(num_blocks) + 3, generator=generator, device=device)
    shape = (len(order), page, kv_heads, head_dim)
    poison = 127 if cache_dtype == torch.int8 else math.nan
    caches = [torch.full(shape, poison, dtype=cache_dtype, device=device) for _ in range(2)]
    scales = [torch.full(shape[:3], math.nan, device=device) for _ in range(2)]
    tables = torch.full((len(lengths) + 2, max(num_blocks) + 2), UNUSED_BLOCK, dtype=torch.int32, device=device)
    rows = torch.randperm(len(lengths) + 2, generator=generator, device=device)[: len(lengths)]
    q_THE = randn(sum(length for length, _ in lengths), heads, head_dim) * spread
    expected_THE = torch.zeros(q_THE.shape, dtype=torch.float64, device=device)
    rounded_THE = torch.zeros_like(q_THE)
    starts, used = [0], 0
    for (length, context), blocks, row in zip(lengths, num_blocks, rows.tolist(), strict=True):
        mine, used = order[used : used + blocks], used + blocks
        tables[row, :blocks] = mine.int()
        slots = (mine[:, None] * page + torch.arange(page, device=device)).flatten()[:context]
        kv = []
        for cache, scale in zip(caches, scales, strict=True):
            x = randn(context, kv_heads, head_dim)
            if cache_dtype == torch.int8:
                x, scale.flatten(0, 1)[slots] = quantize_heads(x)
            cache.flatten(0, 1)[slots] = x.to(cache_dtype)
            wide = x.to(cache_dtype).double()
            kv.append(wide * scale.flatten(0, 1)[slots].double()[..., None] if cache_dtype == torch.int8 else wide)
        queries = slice(starts[-1], starts[-1] + length)
        starts.append(queries.stop)
        if length and context:
            for target, wanted in ((expected_THE, torch.float64), (rounded_THE, dtype)):
                q, k, v = (x.to(wanted) for x in (q_THE[queries], *kv))
                target[queries] = dense_attention(q, k, v, head_dim**-0.5, window)
    quantized = cache_dtype == torch.int8
    return PagedCase(
        q_THE=q_THE,
        k_cache=caches[0],
        v_cache=caches[1],
        k_scales=scales[0] if quantized else None,
        v_scales=scales[1] if quantized else None,
        block_tables_RM=tables,
        rows_B=rows.int(),
        query_start_B1=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens_B=torch.tensor([context for _, context in lengths], dtype=torch.int32, device=device),
        scale=head_dim**-0.5,
        window=window,
        expected_THE=expected_THE,
        rounded_THE=rounded_THE,
    )
