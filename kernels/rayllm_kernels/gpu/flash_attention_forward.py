"""Flash attention, forward (Dao 2023): one pass over the keys with an online softmax, scores never in memory.

A program owns one tile of queries of one head of one sequence. In the two-loop form the keys that every query of the
tile sees are attended to without a mask, and only the tiles at the edges (diagonal, window, end) with one. In the
warp-specialised form one loop masks every tile, since Triton specialises a single loop only; a warp group then loads
while two multiply.
"""

import triton
import triton.language as tl

from rayllm_kernels.gpu.attention_tiles import (
    LN2,
    find_partner,
    find_tile,
    key_range,
    load_tile,
    sees,
    store_tile,
)


@triton.jit
def _attend(
    acc: tl.tensor,
    total: tl.tensor,
    highest: tl.tensor,
    q_tile: tl.tensor,
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
    WARP_SPECIALIZE: tl.constexpr,
) -> tl.tensor:
    """Attend to keys `first` to `last` of the sequence -> (acc, total, highest), each row's sum of weighted values, sum
    of weights and highest score in units of log2."""
    for begin in tl.range(first, last, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        left = keys - begin
        k_tile = load_tile(
            k, k_start + begin, kv_head, left, k_row_stride, k_head_stride,
            BLOCK_N, HEAD_DIM, BLOCK_E, TMA, MASKED and not TMA,
        )  # fmt: skip
        scores = tl.dot(q_tile, k_tile.T)
        if MASKED:
            key = begin + tl.arange(0, BLOCK_N)
            scores = tl.where(sees(at[:, None], key[None, :], keys, window, CAUSAL, WINDOW), scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        # -inf less -inf is no number: the level of a row that has seen nothing yet is 0
        level = tl.where(raised == float("-inf"), 0.0, raised) if MASKED else raised
        weights = tl.exp2(scores * scale_log2 - level[:, None])
        decay = tl.exp2(highest - level)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v_tile = load_tile(
            v, k_start + begin, kv_head, left, v_row_stride, v_head_stride,
            BLOCK_N, HEAD_DIM, BLOCK_E, TMA, MASKED and not WARP_SPECIALIZE,
        )  # fmt: skip
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc)
        highest = raised
    return acc, total, highest


@triton.jit(do_not_specialize=["q_starts_B1", "k_starts_B1", "sequences", "query_rows", "window", "group"])
def flash_attention_forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    q_starts_B1: tl.tensor,
    k_starts_B1: tl.tensor,
    sequences: tl.tensor,
    query_rows: tl.tensor,
    window: tl.tensor,
    group: tl.tensor,
    scale_log2: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_row_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_row_stride: tl.tensor,
    v_head_stride: tl.tensor,
    out_row_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
) -> None:
    tile, head = tl.program_id(0), tl.program_id(1)
    if CAUSAL:  # the tiles with most keys first, so that no long one is left alone at the end
        tile = tl.num_programs(0) - 1 - tile
    sequence, q_start, queries, row = find_tile(
        tile, q_starts_B1, sequences, query_rows, BLOCK_M, BLOCK_B, WARP_SPECIALIZE
    )
    k_start, keys = find_partner(sequence, k_starts_B1, sequences)
    begin, full_begin, full_end, end = key_range(
        row, queries, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW
    )  # fmt: skip
    at = row + keys - queries + tl.arange(0, BLOCK_M)
    left = queries - row
    end = tl.where(left > 0, end, 0)  # a surplus tile does nothing
    full_end = tl.where(left > 0, full_end, 0)
    q_tile = load_tile(
        q, q_start + row, head, left, q_row_stride, q_head_stride,
        BLOCK_M, HEAD_DIM, BLOCK_E, TMA, not TMA,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if WARP_SPECIALIZE:
        acc, total, highest = _attend(
            acc, total, highest, q_tile, k, v, begin, end, at, k_start, keys, head // group, window, scale_log2,
            k_row_stride, k_head_stride, v_row_stride, v_head_stride,
            HEAD_DIM, BLOCK_E, BLOCK_N, CAUSAL, WINDOW, TMA, True, True,
        )  # fmt: skip
    else:
        if WINDOW:
            acc, total, highest = _attend(
                acc, total, highest, q_tile, k, v, begin, full_begin, at, k_start, keys, head // group, window,
                scale_log2, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
                HEAD_DIM, BLOCK_E, BLOCK_N, CAUSAL, WINDOW, TMA, True, False,
            )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, q_tile, k, v, full_begin, full_end, at, k_start, keys, head // group, window,
            scale_log2, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
            HEAD_DIM, BLOCK_E, BLOCK_N, CAUSAL, WINDOW, TMA, False, False,
        )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, q_tile, k, v, full_end, end, at, k_start, keys, head // group, window,
            scale_log2, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
            HEAD_DIM, BLOCK_E, BLOCK_N, CAUSAL, WINDOW, TMA, True, False,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # of rows that see nothing, whose highest score is -inf
    store_tile(
        out, acc / total[:, None], q_start + row, head, left, out_row_stride, HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_E
    )
    rows = tl.arange(0, BLOCK_M)
    lse_tile = (highest + tl.log2(total)) * LN2
    tl.store(lse + head.to(tl.int64) * query_rows + q_start + row + rows, lse_tile, mask=rows < left)
