"""Causal attention of packed queries over a paged key/value cache.

The queries of B sequences lie behind one another in `q_THE`; sequence b owns rows `query_start_B1[b]` to
`query_start_B1[b + 1]`, which are the last of its `context_lens_B[b]` tokens. Their keys and values are already in the
cache: token j of the sequence lies in block `block_tables_RM[rows_B[b], j // P]` at offset `j % P`. Slots past the
context and table entries past the last block are never read, so they may hold anything.

`window` w: a token sees itself and the w - 1 tokens before it. Query head h reads kv head `h // (H // K)`. A query that
sees no key gives zeros.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def _gather(cache_NPKE: Tensor, blocks_M: Tensor, start: int, stop: int) -> Tensor:
    """Tokens `start` to `stop` of the sequence that owns `blocks_M` -> [stop - start, K, E]."""
    page = cache_NPKE.shape[1]
    first = start // page
    tokens = cache_NPKE[blocks_M[first : -(-stop // page)]].flatten(0, 1)
    return tokens[start - first * page : stop - first * page]


def paged_attention_reference(
    q_THE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    *,
    block_tables_RM: Tensor,
    rows_B: Tensor,
    query_start_B1: Tensor,
    context_lens_B: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """The contract of `paged_attention` in plain torch, in the wider of q's and the cache's dtype, on any device."""
    dtype = torch.promote_types(torch.promote_types(q_THE.dtype, k_cache_NPKE.dtype), torch.float32)
    out_THE = torch.zeros_like(q_THE)
    group = q_THE.shape[1] // k_cache_NPKE.shape[2]
    starts = query_start_B1.tolist()
    for b, (row, context) in enumerate(zip(rows_B.tolist(), context_lens_B.tolist(), strict=True)):
        queries = slice(starts[b], starts[b + 1])
        length = queries.stop - queries.start
        if length == 0 or context == 0:
            continue
        k_SHE, v_SHE = (
            _gather(cache, block_tables_RM[row].long(), 0, context).to(dtype).repeat_interleave(group, dim=1)
            for cache in (k_cache_NPKE, v_cache_NPKE)
        )
        scores = torch.einsum("qhe,she->hqs", q_THE[queries].to(dtype), k_SHE) * scale
        at = torch.arange(context - length, context, device=q_THE.device)[:, None]
        key = torch.arange(context, device=q_THE.device)[None, :]
        visible = key <= at
        if window is not None:
            visible &= key > at - window
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out_THE[queries] = torch.einsum("hqs,she->qhe", weights, v_SHE).to(q_THE.dtype)
    return out_THE


def _attend_gathered(q_SHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, scale: float, window: int | None) -> Tensor:
    """One sequence's queries, the last of the gathered keys' tokens, by torch's own attention -> out_SHE."""
    length, context = q_SHE.shape[0], k_SKE.shape[0]
    mask = None
    if length != context or (window is not None and window < context):
        at = torch.arange(context - length, context, device=q_SHE.device)[:, None]
        key = torch.arange(context, device=q_SHE.device)[None, :]
        mask = key <= at
        if window is not None:
            mask &= key > at - window
    q, k, v = (x.to(k_SKE.dtype).transpose(0, 1).unsqueeze(0) for x in (q_SHE, k_SKE, v_SKE))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def paged_attention(
    q_THE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    *,
    block_tables_RM: Tensor,
    rows_B: Tensor,
    query_start_B1: Tensor,
    context_lens_B: Tensor,
    scale: float,
    window: int | None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend as the module says; `out` (shape and dtype of q) is filled and returned when given."""
    out_THE = torch.empty_like(q_THE) if out is None else out
    starts = query_start_B1.tolist()
    for b, (row, context) in enumerate(zip(rows_B.tolist(), context_lens_B.tolist(), strict=True)):
        queries = slice(starts[b], starts[b + 1])
        length = queries.stop - queries.start
        if length == 0:
            continue
        if context == 0:
            out_THE[queries] = 0
            continue
        first = 0 if window is None else max(0, context - length - window + 1)
        blocks_M = block_tables_RM[row].long()
        k_SKE, v_SKE = (_gather(cache, blocks_M, first, context) for cache in (k_cache_NPKE, v_cache_NPKE))
        out_THE[queries] = _attend_gathered(q_THE[queries], k_SKE, v_SKE, scale, window).to(q_THE.dtype)
    return out_THE
