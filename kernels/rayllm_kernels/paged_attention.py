"""Causal attention of packed queries over a paged key/value cache.

The queries of B sequences lie behind one another in `q_THE`; sequence b owns rows `query_start_B1[b]` to
`query_start_B1[b + 1]`, which are the last of its `context_lens_B[b]` tokens. Their keys and values are already in the
cache: token j of the sequence lies in block `block_tables_RM[rows_B[b], j // P]` at offset `j % P`. Slots past the
context and table entries past the last block are never read, so they may hold anything.

`window` w: a token sees itself and the w - 1 tokens before it. Query head h reads kv head `h // (H // K)`. A query that
sees no key gives zeros.

Caches of int8 hold value * scale, with a float32 scale for each token and head at the same slot of `k_scales_NPK` and
`v_scales_NPK`, as `store_kv` writes them.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels.dispatch import LONGEST_IN_PLACE, loops_without_gradient_may_run, on_triton
from rayllm_kernels.native import Kernel, empty, integer, next_task, real
from rayllm_kernels.simd import (
    LANES,
    F32x16,
    add,
    broadcast,
    exp,
    fma,
    inlined,
    load,
    load_bf16,
    load_f32,
    load_i8,
    load_i32,
    load_i64,
    max_lanes,
    mul,
    prefetch,
    store,
    store_bf16,
    store_f32,
    store_i64,
    sub,
    sum_lanes,
)


def _gather(
    cache_NPKE: Tensor, scales_NPK: Tensor | None, blocks_M: Tensor, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Tokens `start` to `stop` of the sequence that owns `blocks_M` -> [stop - start, K, E] in `dtype`."""
    page = cache_NPKE.shape[1]
    first = start // page
    blocks = blocks_M[first : -(-stop // page)]
    tokens = slice(start - first * page, stop - first * page)
    values_SKE = cache_NPKE[blocks].flatten(0, 1)[tokens].to(dtype)
    return (
        values_SKE if scales_NPK is None else values_SKE * scales_NPK[blocks].flatten(0, 1)[tokens, :, None].to(dtype)
    )


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
    k_scales_NPK: Tensor | None = None,
    v_scales_NPK: Tensor | None = None,
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
            _gather(cache, scales, block_tables_RM[row].long(), 0, context, dtype).repeat_interleave(group, dim=1)
            for cache, scales in ((k_cache_NPKE, k_scales_NPK), (v_cache_NPKE, v_scales_NPK))
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


_TILE = 64  # keys per softmax update; a multiple of the lanes


@inlined
def _load(address: int, item: int) -> F32x16:
    """LANES values as float32; `item`: bytes of one, 4 for float32, 2 for bfloat16, 1 for int8."""
    if item == 1:
        return load_i8(address)  # type: ignore[no-any-return]
    return load_bf16(address) if item == 2 else load(address)  # type: ignore[no-any-return]


@inlined
def _dot(a: int, b: int, length: int, item: int) -> float:
    """Scalar product of a float32 array and one of any dtype whose `length` is a multiple of 16."""
    s0 = s1 = s2 = s3 = broadcast(np.float32(0.0))
    whole = length // 64 * 64
    for i in range(0, whole, 64):
        x, y = a + 4 * i, b + item * i
        s0 = fma(load(x), _load(y, item), s0)
        s1 = fma(load(x + 64), _load(y + 16 * item, item), s1)
        s2 = fma(load(x + 128), _load(y + 32 * item, item), s2)
        s3 = fma(load(x + 192), _load(y + 48 * item, item), s3)
    for i in range(whole, length, LANES):
        s0 = fma(load(a + 4 * i), _load(b + item * i, item), s0)
    return sum_lanes(add(add(s0, s1), add(s2, s3)))  # type: ignore[no-any-return]


@inlined
def _accumulate(
    acc: int, decay: float, weights: int, addresses: int, shift: int, keys: int, length: int, item: int
) -> None:
    """acc[0:length] = acc * decay + sum over j < keys of weights[j] * (array at addresses[j] + shift).

    acc and weights are float32, the arrays of any dtype.
    """
    whole = length // 64 * 64
    scale = broadcast(np.float32(decay))
    for i in range(0, whole, 64):
        target = acc + 4 * i
        s0, s1 = mul(load(target), scale), mul(load(target + 64), scale)
        s2, s3 = mul(load(target + 128), scale), mul(load(target + 192), scale)
        for j in range(keys):
            weight = broadcast(load_f32(weights + 4 * j))
            value = load_i64(addresses + 8 * j) + shift + item * i
            s0 = fma(weight, _load(value, item), s0)
            s1 = fma(weight, _load(value + 16 * item, item), s1)
            s2 = fma(weight, _load(value + 32 * item, item), s2)
            s3 = fma(weight, _load(value + 48 * item, item), s3)
        store(target, s0)
        store(target + 64, s1)
        store(target + 128, s2)
        store(target + 192, s3)
    for i in range(whole, length, LANES):
        s0 = mul(load(acc + 4 * i), scale)
        for j in range(keys):
            value = load_i64(addresses + 8 * j) + shift + item * i
            s0 = fma(broadcast(load_f32(weights + 4 * j)), _load(value, item), s0)
        store(acc + 4 * i, s0)


@inlined
def _softmax_tile(scores: int, keys: int, highest: float) -> tuple[float, float]:
    """Turn a tile's scores into weights e**(score - new highest) -> (new highest, sum of the weights)."""
    for j in range(keys, (keys + LANES - 1) // LANES * LANES):
        store_f32(scores + 4 * j, np.float32(-np.inf))
    for i in range(0, keys * 4, 64):
        highest = max(highest, max_lanes(load(scores + i)))
    level, total = broadcast(highest), broadcast(np.float32(0.0))
    for i in range(0, keys * 4, 64):
        weights = exp(sub(load(scores + i), level))
        store(scores + i, weights)
        total = add(total, weights)
    return highest, sum_lanes(total)


@inlined
def _load_scaled(source: int, target: int, length: int, scale: float, is_bf16: int) -> None:
    """target[0:length] = source * scale, as float32."""
    factor, item = broadcast(np.float32(scale)), 2 if is_bf16 else 4
    for i in range(0, length, LANES):
        store(target + 4 * i, mul(_load(source + item * i, item), factor))


@inlined
def _store_scaled(source: int, target: int, length: int, scale: float, is_bf16: int) -> None:
    """target[0:length] = float32 source * scale."""
    factor = broadcast(np.float32(scale))
    for i in range(0, length, LANES):
        values = mul(load(source + 4 * i), factor)
        if is_bf16:
            store_bf16(target + 2 * i, values)
        else:
            store(target + 4 * i, values)


@inlined
def _locate(
    table: int, first: int, keys: int, page: int, pitch: int, shift: int, cache: int, size: int, addresses: int
) -> None:
    """addresses[j] = bytes from a cache's start to token first + j of the sequence; asks for those of `cache` ahead.

    `pitch`: bytes from one slot to the next; `shift`: from a slot's start to the kv head; `size`: of the head.
    """
    index, within = first // page, first % page
    for j in range(keys):
        offset = (load_i32(table + 4 * index) * page + within) * pitch + shift
        store_i64(addresses + 8 * j, offset)
        for i in range(0, size, 64):
            prefetch(cache + offset + i)
        within += 1
        if within == page:
            index, within = index + 1, 0


def _attend_pages(block: int) -> None:
    """Kernel: task = (query token, kv head). Online softmax over tiles of keys, read where they lie."""
    q, out, k_cache, v_cache = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    tables, rows, starts, contexts = integer(block, 4), integer(block, 5), integer(block, 6), integer(block, 7)
    heads, kv_heads, head_dim, page = integer(block, 8), integer(block, 9), integer(block, 10), integer(block, 11)
    table_stride, token_stride, head_stride = integer(block, 12), integer(block, 13), integer(block, 14)
    is_bf16, window, longest = integer(block, 15), integer(block, 16), integer(block, 17)
    cache_item, k_scales, v_scales = integer(block, 18), integer(block, 19), integer(block, 20)
    scale = real(block, 21)
    group, head_bytes, item = heads // kv_heads, 4 * head_dim, 2 if is_bf16 else 4
    page_head_bytes = cache_item * head_dim
    floats, integers = np.empty(group * (2 * head_dim + _TILE + 2), np.float32), np.empty(_TILE, np.int64)
    queries, addresses = floats.ctypes.data, integers.ctypes.data
    acc = queries + group * head_bytes
    scores = acc + group * head_bytes
    highest = scores + 4 * group * _TILE
    totals = highest + 4 * group
    task = next_task(block)
    while task >= 0:
        token, kv_head = task // kv_heads, task % kv_heads
        b = 0
        while token >= load_i32(starts + 4 * (b + 1)):
            b += 1
        if load_i32(starts + 4 * (b + 1)) - load_i32(starts + 4 * b) > longest:  # left to the other path
            task = next_task(block)
            continue
        for g in range(group):
            source = q + item * (token * token_stride + (kv_head * group + g) * head_stride)
            _load_scaled(source, queries + g * head_bytes, head_dim, scale, is_bf16)
            for i in range(0, head_bytes, 64):
                store(acc + g * head_bytes + i, broadcast(np.float32(0.0)))
            store_f32(highest + 4 * g, np.float32(-np.inf))
            store_f32(totals + 4 * g, np.float32(0.0))
        end = load_i32(contexts + 4 * b) - (load_i32(starts + 4 * (b + 1)) - token) + 1
        first = max(0, end - window) if window > 0 else 0
        table = tables + 4 * load_i32(rows + 4 * b) * table_stride
        while first < end:
            keys = min(_TILE, end - first)
            pitch, shift = kv_heads * page_head_bytes, kv_head * page_head_bytes
            _locate(table, first, keys, page, pitch, shift, k_cache, page_head_bytes, addresses)
            for j in range(keys):
                offset = load_i64(addresses + 8 * j)
                for i in range(0, page_head_bytes, 64):
                    prefetch(v_cache + offset + i)
                step = load_f32(k_scales + 4 * (offset // page_head_bytes)) if k_scales != 0 else np.float32(1.0)
                for g in range(group):
                    score = _dot(queries + g * head_bytes, k_cache + offset, head_dim, cache_item)
                    store_f32(scores + 4 * (g * _TILE + j), np.float32(score * step))
            for g in range(group):
                old, weights = load_f32(highest + 4 * g), scores + 4 * g * _TILE
                new, total = _softmax_tile(weights, keys, old)
                decay = math.exp(old - new)
                store_f32(highest + 4 * g, new)
                store_f32(totals + 4 * g, np.float32(load_f32(totals + 4 * g) * decay + total))
                if v_scales != 0:
                    for j in range(keys):
                        step = load_f32(v_scales + 4 * (load_i64(addresses + 8 * j) // page_head_bytes))
                        store_f32(weights + 4 * j, np.float32(load_f32(weights + 4 * j) * step))
                _accumulate(acc + g * head_bytes, decay, weights, addresses, v_cache, keys, head_dim, cache_item)
            first += keys
        for g in range(group):
            total = load_f32(totals + 4 * g)
            target = out + item * (token * heads + kv_head * group + g) * head_dim
            _store_scaled(acc + g * head_bytes, target, head_dim, 1 / total if total != 0 else 0.0, is_bf16)
        task = next_task(block)
    floats[0] = integers[0] = 0  # numba frees an array after its last use, and addresses are no use


_attend_pages_kernel = Kernel(_attend_pages, integers=21, reals=1)


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


def _pages_in_place(q: Tensor, out: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor) -> bool:
    """Whether the compiled kernel takes these tensors."""
    return (
        loops_without_gradient_may_run(q)
        and (q.dtype == torch.bfloat16 or q.dtype == torch.float32)
        and (k_cache.dtype == torch.bfloat16 or k_cache.dtype == torch.float32 or k_cache.dtype == torch.int8)
        and k_cache.dtype == v_cache.dtype
        and q.shape[2] % LANES == 0
        and q.stride(2) == 1
        and out.is_contiguous()
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and tables.dtype == torch.int32
        and tables.stride(1) == 1
    )


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
    k_scales_NPK: Tensor | None = None,
    v_scales_NPK: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend as the module says; `out` (shape and dtype of q) is filled and returned when given."""
    out_THE = empty(q_THE.shape, q_THE) if out is None else out
    if on_triton("paged_attention", q_THE) and not torch.is_grad_enabled():
        from rayllm_kernels.gpu import paged_attention as gpu

        if gpu.supports(q_THE, out_THE, k_cache_NPKE, v_cache_NPKE, block_tables_RM):
            lengths = (rows_B, query_start_B1, context_lens_B)
            caches = (k_cache_NPKE, v_cache_NPKE, k_scales_NPK, v_scales_NPK)
            gpu.paged_attention(q_THE, *caches, block_tables_RM, *lengths, scale, window, out_THE)
            return out_THE
    sequences, longest = rows_B.shape[0], 0
    if _pages_in_place(q_THE, out_THE, k_cache_NPKE, v_cache_NPKE, block_tables_RM) and all(
        x.dtype == torch.int32 and x.is_contiguous() for x in (rows_B, query_start_B1, context_lens_B)
    ):
        decode_only = q_THE.shape[0] <= sequences  # no more than a query each
        longest = q_THE.shape[0] if decode_only else LONGEST_IN_PLACE
        _, page, kv_heads, head_dim = k_cache_NPKE.shape
        _attend_pages_kernel(
            q_THE.shape[0] * kv_heads,
            q_THE.data_ptr(),
            out_THE.data_ptr(),
            k_cache_NPKE.data_ptr(),
            v_cache_NPKE.data_ptr(),
            block_tables_RM.data_ptr(),
            rows_B.data_ptr(),
            query_start_B1.data_ptr(),
            context_lens_B.data_ptr(),
            q_THE.shape[1],
            kv_heads,
            head_dim,
            page,
            block_tables_RM.stride(0),
            q_THE.stride(0),
            q_THE.stride(1),
            q_THE.dtype == torch.bfloat16,
            window or 0,
            longest,
            k_cache_NPKE.dtype.itemsize,
            0 if k_scales_NPK is None else k_scales_NPK.data_ptr(),
            0 if v_scales_NPK is None else v_scales_NPK.data_ptr(),
            scale,
        )
        if decode_only:
            return out_THE
    starts = query_start_B1.tolist()
    for b in range(sequences):
        queries = slice(starts[b], starts[b + 1])
        length = queries.stop - queries.start
        if length <= longest:
            continue
        context = int(context_lens_B[b])
        if context == 0:
            out_THE[queries] = 0
            continue
        first = 0 if window is None else max(0, context - length - window + 1)
        blocks_M = block_tables_RM[int(rows_B[b])].long()
        wide = q_THE.dtype if k_cache_NPKE.dtype == torch.int8 else k_cache_NPKE.dtype
        if q_THE.is_cpu and not q_THE.dtype == k_cache_NPKE.dtype == torch.bfloat16:  # float16 crawls, int8 would lose
            wide = torch.promote_types(wide, torch.float32)
        k_SKE, v_SKE = (
            _gather(cache, scales, blocks_M, first, context, wide)
            for cache, scales in ((k_cache_NPKE, k_scales_NPK), (v_cache_NPKE, v_scales_NPK))
        )
        out_THE[queries] = _attend_gathered(q_THE[queries], k_SKE, v_SKE, scale, window).to(q_THE.dtype)
    return out_THE
