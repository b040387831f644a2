"""Flash attention, backward (Dao 2023): weights are computed again from the log-sum-exp, never stored.

With P the weights, dP = dO V^T, delta = rowsum(dO * O) - dLSE and dS = P * (dP - delta):
dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q. One kernel takes delta, one owns tiles of keys and walks over all
queries that see them (dK, dV), one owns tiles of queries and walks over their keys (dQ). Each result has one writer,
which adds in a fixed order, so gradients are the same bit by bit in every run. The price is computing P and dP twice.
"""

import triton
import triton.language as tl

from rayllm_kernels.gpu.attention_tiles import (
    LOG2E,
    find_partner,
    find_tile,
    key_range,
    load_tile,
    round_down,
    sees,
    store_tile,
)


@triton.jit(do_not_specialize=["query_rows"])
def flash_attention_delta_kernel(
    out: tl.tensor,
    dout: tl.tensor,
    dlse: tl.tensor,
    delta: tl.tensor,
    query_rows: tl.tensor,
    out_row_stride: tl.tensor,
    dout_row_stride: tl.tensor,
    dout_head_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
) -> None:
    row, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    left = query_rows - row
    o_tile = load_tile(
        out, row, head, left, out_row_stride, HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_E, False, True
    )  # fmt: skip
    do_tile = load_tile(
        dout, row, head, left, dout_row_stride, dout_head_stride, BLOCK_M, HEAD_DIM, BLOCK_E, False, True
    )  # fmt: skip
    result = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    rows = tl.arange(0, BLOCK_M)
    offsets = head.to(tl.int64) * query_rows + row + rows
    if HAS_DLSE:
        result -= tl.load(dlse + offsets, mask=rows < left, other=0.0)
    tl.store(delta + offsets, result, mask=rows < left)


@triton.jit
def _walk_queries(
    dk: tl.tensor,
    dv: tl.tensor,
    k_tile: tl.tensor,
    v_tile: tl.tensor,
    q: tl.tensor,
    dout: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    key: tl.tensor,
    q_start: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    head: tl.tensor,
    window: tl.tensor,
    scale_log2: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    dout_row_stride: tl.tensor,
    dout_head_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """Add what queries `first` to `last` give to the tile's keys -> (dk, dv). Everything is transposed, keys first, so
    that the weights multiply from the left, out of registers. One loop masks every tile: a second loop without a mask
    would spill registers."""
    for begin in tl.range(first, last, BLOCK_M):
        left = queries - begin
        rows = tl.arange(0, BLOCK_M)
        q_tile = load_tile(
            q, q_start + begin, head, left, q_row_stride, q_head_stride,
            BLOCK_M, HEAD_DIM, BLOCK_E, TMA, True,
        )  # fmt: skip
        lse_tile = tl.load(lse + begin + rows, mask=rows < left, other=float("inf"))
        delta_tile = tl.load(delta + begin + rows, mask=rows < left, other=0.0)
        scores_T = tl.dot(k_tile, q_tile.T)
        weights_T = tl.exp2(scores_T * scale_log2 - (lse_tile * LOG2E)[None, :])
        at = begin + rows + keys - queries
        weights_T = tl.where(sees(at[None, :], key[:, None], keys, window, CAUSAL, WINDOW), weights_T, 0.0)
        do_tile = load_tile(
            dout, q_start + begin, head, left, dout_row_stride, dout_head_stride,
            BLOCK_M, HEAD_DIM, BLOCK_E, TMA, True,
        )  # fmt: skip
        dv = tl.dot(weights_T.to(do_tile.dtype), do_tile, dv)
        dweights_T = tl.dot(v_tile, do_tile.T)
        dscores_T = weights_T * (dweights_T - delta_tile[None, :])
        dk = tl.dot(dscores_T.to(q_tile.dtype), q_tile, dk)
    return dk, dv


@triton.jit(do_not_specialize=["q_starts_B1", "k_starts_B1", "sequences", "query_rows", "key_rows", "window", "group"])
def flash_attention_dkdv_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dout: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    q_starts_B1: tl.tensor,
    k_starts_B1: tl.tensor,
    sequences: tl.tensor,
    query_rows: tl.tensor,
    key_rows: tl.tensor,
    window: tl.tensor,
    group: tl.tensor,
    scale: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_row_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_row_stride: tl.tensor,
    v_head_stride: tl.tensor,
    dout_row_stride: tl.tensor,
    dout_head_stride: tl.tensor,
    dk_row_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
) -> None:
    """One tile of keys of one kv head, over all query heads that read it: no two programs write to one place."""
    kv_head = tl.program_id(1)
    sequence, k_start, keys, row = find_tile(
        tl.program_id(0), k_starts_B1, sequences, key_rows, BLOCK_N, BLOCK_B, False
    )  # fmt: skip
    left = keys - row
    if left <= 0:
        return
    q_start, queries = find_partner(sequence, q_starts_B1, sequences)
    shift = keys - queries
    key, key_last = row + tl.arange(0, BLOCK_N), tl.minimum(row + BLOCK_N, keys) - 1
    begin, end = 0, queries
    if CAUSAL:
        begin = tl.minimum(round_down(row - shift, BLOCK_M), queries)
    if WINDOW:
        end = tl.minimum(queries, key_last + window - shift)
    k_tile = load_tile(
        k, k_start + row, kv_head, left, k_row_stride, k_head_stride,
        BLOCK_N, HEAD_DIM, BLOCK_E, TMA, not TMA,
    )  # fmt: skip
    v_tile = load_tile(
        v, k_start + row, kv_head, left, v_row_stride, v_head_stride,
        BLOCK_N, HEAD_DIM, BLOCK_E, TMA, not TMA,
    )  # fmt: skip
    dk_tile = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        lse_head = lse + head.to(tl.int64) * query_rows + q_start
        delta_head = delta + head.to(tl.int64) * query_rows + q_start
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, lse_head, delta_head, begin, end, key, q_start,
            queries, keys, head, window, scale * LOG2E,
            q_row_stride, q_head_stride, dout_row_stride, dout_head_stride,
            HEAD_DIM, BLOCK_E, BLOCK_M, CAUSAL, WINDOW, TMA,
        )  # fmt: skip
    store_tile(dk, dk_tile * scale, k_start + row, kv_head, left, dk_row_stride, HEAD_DIM, BLOCK_N, HEAD_DIM, BLOCK_E)
    store_tile(dv, dv_tile, k_start + row, kv_head, left, dk_row_stride, HEAD_DIM, BLOCK_N, HEAD_DIM, BLOCK_E)


@triton.jit
def _walk_keys(
    dq: tl.tensor,
    q_tile: tl.tensor,
    do_tile: tl.tensor,
    lse_tile: tl.tensor,
    delta_tile: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    at: tl.tensor,
    k_start: tl.tensor,
    keys: tl.tensor,
    kv_head: tl.tensor,
    window: tl.tensor,
    scale_log2: tl.tensor,
    k_row_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_row_stride: tl.tensor,
    v_head_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Add what keys `first` to `last` give to the tile's queries -> dq. `lse_tile` in units of log2."""
    for begin in tl.range(first, last, BLOCK_N):
        left = keys - begin
        k_tile = load_tile(
            k, k_start + begin, kv_head, left, k_row_stride, k_head_stride,
            BLOCK_N, HEAD_DIM, BLOCK_E, TMA, MASKED,
        )  # fmt: skip
        v_tile = load_tile(
            v, k_start + begin, kv_head, left, v_row_stride, v_head_stride,
            BLOCK_N, HEAD_DIM, BLOCK_E, TMA, MASKED and not TMA,
        )  # fmt: skip
        scores = tl.dot(q_tile, k_tile.T)
        dweights = tl.dot(do_tile, v_tile.T)
        weights = tl.exp2(scores * scale_log2 - lse_tile[:, None])
        dscores = weights * (dweights - delta_tile[:, None])
        if MASKED:
            key = begin + tl.arange(0, BLOCK_N)
            dscores = tl.where(sees(at[:, None], key[None, :], keys, window, CAUSAL, WINDOW), dscores, 0.0)
        dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq)
    return dq


@triton.jit(do_not_specialize=["q_starts_B1", "k_starts_B1", "sequences", "query_rows", "window", "group"])
def flash_attention_dq_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dout: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dq: tl.tensor,
    q_starts_B1: tl.tensor,
    k_starts_B1: tl.tensor,
    sequences: tl.tensor,
    query_rows: tl.tensor,
    window: tl.tensor,
    group: tl.tensor,
    scale: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_row_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_row_stride: tl.tensor,
    v_head_stride: tl.tensor,
    dout_row_stride: tl.tensor,
    dout_head_stride: tl.tensor,
    dq_row_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
) -> None:
    tile, head = tl.program_id(0), tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile
    sequence, q_start, queries, row = find_tile(tile, q_starts_B1, sequences, query_rows, BLOCK_M, BLOCK_B, False)
    left = queries - row
    if left <= 0:
        return
    k_start, keys = find_partner(sequence, k_starts_B1, sequences)
    begin, full_begin, full_end, end = key_range(
        row, queries, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
    )  # fmt: skip
    at = row + keys - queries + tl.arange(0, BLOCK_M)
    q_tile = load_tile(
        q, q_start + row, head, left, q_row_stride, q_head_stride,
        BLOCK_M, HEAD_DIM, BLOCK_E, TMA, not TMA,
    )  # fmt: skip
    do_tile = load_tile(
        dout, q_start + row, head, left, dout_row_stride, dout_head_stride,
        BLOCK_M, HEAD_DIM, BLOCK_E, TMA, not TMA,
    )  # fmt: skip
    rows = tl.arange(0, BLOCK_M)
    offsets = head.to(tl.int64) * query_rows + q_start + row + rows
    lse_tile = tl.load(lse + offsets, mask=rows < left, other=float("inf")) * LOG2E
    delta_tile = tl.load(delta + offsets, mask=rows < left, other=0.0)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if WINDOW:
        dq_tile = _walk_keys(
            dq_tile, q_tile, do_tile, lse_tile, delta_tile, k, v, begin, full_begin, at, k_start, keys, head // group,
            window, scale * LOG2E, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
            HEAD_DIM, BLOCK_E, BLOCK_N, CAUSAL, WINDOW, TMA, True,
        )  # fmt: skip
    dq_tile = _walk_keys(
        dq_tile, q_tile, do_tile, lse_tile, delta_tile, k, v, full_begin, full_end, at, k_start, keys, head // group,
        window, scale * LOG2E, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
        HEAD_DIM, BLOCK_E, BLOCK_N, CAUSAL, WINDOW, TMA, False,
    )  # fmt: skip
    dq_tile = _walk_keys(
        dq_tile, q_tile, do_tile, lse_tile, delta_tile, k, v, full_end, end, at, k_start, keys, head // group,
        window, scale * LOG2E, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
        HEAD_DIM, BLOCK_E, BLOCK_N, CAUSAL, WINDOW, TMA, True,
    )  # fmt: skip
    store_tile(dq, dq_tile * scale, q_start + row, head, left, dq_row_stride, HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_E)
