"""The kernels of `paged_attention`: one for chunked prefill over pages and for decode, and one that joins its splits.

A query block is BLOCK_Q tokens of a sequence with the GROUP query heads of one kv head, packed as the rows of one
matrix. It walks its keys in tiles whatever the page size: every key finds its own slot through the block table. Long
contexts are split as `split_work` says.

Sums are taken in a fixed order: the same call gives the same bits; in another batch a sequence may be split otherwise.
"""

import triton
import triton.language as tl

from rayllm_kernels.gpu.split_work import find_work


@triton.jit
def _attend_tile(
    acc_ME: tl.tensor,
    highest_M: tl.tensor,
    total_M: tl.tensor,
    q_ME: tl.tensor,
    at_M: tl.tensor,
    tile: tl.tensor,
    end: tl.tensor,
    table: tl.tensor,
    kv_head: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    INT8: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax, in base 2. Without MASKED every row sees the whole tile."""
    BLOCK_E: tl.constexpr = q_ME.shape[1]
    key = tile * TILE + tl.arange(0, TILE)
    inside = key < end if MASKED else tl.full((TILE,), True, tl.int1)
    e = tl.arange(0, BLOCK_E)
    head = tl.load(table + key // PAGE, inside, 0).to(tl.int64) * PAGE + key % PAGE
    head = head * KV_HEADS + kv_head
    k_inside, v_inside = inside[None, :], inside[:, None]
    if BLOCK_E != HEAD_DIM:
        k_inside &= (e < HEAD_DIM)[:, None]
        v_inside &= (e < HEAD_DIM)[None, :]
    k_EN = tl.load(k_cache + head[None, :] * HEAD_DIM + e[:, None], k_inside, 0).to(q_ME.dtype)
    v_NE = tl.load(v_cache + head[:, None] * HEAD_DIM + e[None, :], v_inside, 0).to(q_ME.dtype)
    scores_MN = tl.dot(q_ME, k_EN, input_precision="ieee") * scale
    if INT8:
        scores_MN *= tl.load(k_scales + head, inside, 0)[None, :]
    if MASKED:
        visible = (key[None, :] <= at_M[:, None]) & inside[None, :]
        if HAS_WINDOW:
            visible &= key[None, :] > at_M[:, None] - window
        scores_MN = tl.where(visible, scores_MN, float("-inf"))
    new_M = tl.maximum(highest_M, tl.max(scores_MN, 1))
    level_M = tl.where(new_M == float("-inf"), 0.0, new_M)  # a row that has seen no key: no inf - inf
    weights_MN = tl.exp2(scores_MN - level_M[:, None])
    decay_M = tl.exp2(highest_M - level_M)
    total_M = total_M * decay_M + tl.sum(weights_MN, 1)
    acc_ME *= decay_M[:, None]
    if INT8 and q_ME.dtype == tl.float16:
        # float16 has no small numbers: this tile is added in units of about the largest of its scales
        scale_N = tl.load(v_scales + head, inside, 0)
        unit = _power_of_two(tl.max(scale_N, 0))
        weights_MN *= (scale_N / unit)[None, :]
        acc_ME = tl.dot(weights_MN.to(q_ME.dtype), v_NE, acc_ME / unit) * unit
    elif INT8:
        weights_MN *= tl.load(v_scales + head, inside, 0)[None, :]
        acc_ME = tl.dot(weights_MN.to(q_ME.dtype), v_NE, acc_ME, input_precision="ieee")
    else:
        acc_ME = tl.dot(weights_MN.to(q_ME.dtype), v_NE, acc_ME, input_precision="ieee")
    return acc_ME, new_M, total_M


@triton.jit
def _power_of_two(x: tl.tensor) -> tl.tensor:
    """The largest that is not above x, which is not negative, but 2**-64 at least: to multiply by it, or to divide by
    it what came by such a factor, rounds nothing."""
    return (tl.maximum(x, 2.0**-64).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=[
        *("tables", "rows", "starts", "contexts", "table_stride"),
        *("window", "num_sequences", "max_items"),
    ]
)
def attend_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    out: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    tables: tl.tensor,
    rows: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    num_sequences: tl.tensor,
    max_items: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    INT8: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """Program = (item, kv head). `scale` has log2(e) in it.

    WHOLE_TILES: tiles that all rows see whole have a loop of their own without masks, which pays where the products
    bound the speed, not where memory does.
    """
    kv_head = tl.program_id(0) % KV_HEADS  # side by side in memory, so side by side in time
    sequence, within, splits, slot = find_work(
        tl.program_id(0) // KV_HEADS,
        starts,
        contexts,
        num_sequences,
        window,
        max_items,
        BLOCK_Q,
        TILE,
        HAS_WINDOW,
        MIN_TILES,
        BLOCK_B,
        False,
    )
    if sequence < 0:
        return
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride
    first_query = (tl.cdiv(length, BLOCK_Q) - 1 - within // splits) * BLOCK_Q  # the longest first
    m = tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    query_M = first_query + m // GROUP
    real_M = (m < BLOCK_Q * GROUP) & (query_M < length)
    token_M = (start + query_M).to(tl.int64)
    head_M = kv_head * GROUP + m % GROUP
    real_ME = real_M[:, None] & (e < HEAD_DIM)[None, :]
    q_M = token_M * q_token_stride + head_M * q_head_stride
    q_ME = tl.load(q + q_M[:, None] + e[None, :], real_ME, 0)
    if not INT8 and q.dtype.element_ty != k_cache.dtype.element_ty:
        q_ME = q_ME.to(tl.float32)

    at_M = context - length + query_M
    at = context - length + first_query  # the first row's position: what it sees, all rows see
    end = tl.maximum(tl.minimum(at + BLOCK_Q, context), 0)
    low = tl.maximum(at - window + 1, 0) // TILE if HAS_WINDOW else 0
    tiles = tl.cdiv(end, TILE) - low
    split = within % splits
    begin = low + (tiles * split) // splits
    stop = low + (tiles * (split + 1)) // splits
    acc_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    highest_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    whole = begin
    masked = begin  # tiles [begin, whole) and [masked, stop) need masks
    if WHOLE_TILES:
        if HAS_WINDOW:
            whole = tl.cdiv(tl.maximum(end - window, 0), TILE)
            whole = tl.minimum(tl.maximum(whole, begin), stop)
        masked = tl.minimum(tl.maximum(tl.maximum(at + 1, 0) // TILE, whole), stop)
        for tile in range(whole, masked):
            acc_ME, highest_M, total_M = _attend_tile(
                acc_ME,
                highest_M,
                total_M,
                q_ME,
                at_M,
                tile,
                end,
                table,
                kv_head,
                k_cache,
                v_cache,
                k_scales,
                v_scales,
                scale,
                window,
                KV_HEADS,
                HEAD_DIM,
                PAGE,
                TILE,
                HAS_WINDOW,
                INT8,
                False,
            )
    for i in range(begin, stop - (masked - whole)):
        acc_ME, highest_M, total_M = _attend_tile(
            acc_ME,
            highest_M,
            total_M,
            q_ME,
            at_M,
            tl.where(i < whole, i, i + (masked - whole)),
            end,
            table,
            kv_head,
            k_cache,
            v_cache,
            k_scales,
            v_scales,
            scale,
            window,
            KV_HEADS,
            HEAD_DIM,
            PAGE,
            TILE,
            HAS_WINDOW,
            INT8,
            True,
        )

    divisor_M = tl.where(total_M > 0, total_M, 1.0)  # 0: a row that sees no key
    acc_ME = acc_ME / divisor_M[:, None]
    if splits == 1:
        out_M = (token_M * (KV_HEADS * GROUP) + head_M) * HEAD_DIM
        tl.store(out + out_M[:, None] + e[None, :], acc_ME.to(out.dtype.element_ty), real_ME)
    else:
        row_M = ((slot + within).to(tl.int64) * KV_HEADS + kv_head) * (BLOCK_Q * GROUP) + m
        tl.store(partial_out + row_M[:, None] * HEAD_DIM + e[None, :], acc_ME, real_ME)
        lse_M = highest_M + tl.log2(divisor_M)  # -inf where no key was seen
        tl.store(partial_lse + row_M, lse_M, real_M)


@triton.jit(do_not_specialize=["starts", "contexts", "window", "num_sequences", "max_items"])
def join_kernel(
    out: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    window: tl.tensor,
    num_sequences: tl.tensor,
    max_items: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """Program = (query block of several splits, kv head, ROWS of its rows): the mean of its splits, weighted by their
    sums of exponentials. SPLITS are read at a time; one that saw no key has -inf and no weight.
    """
    chunks: tl.constexpr = (BLOCK_Q * GROUP + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) // chunks % KV_HEADS
    sequence, within, splits, slot = find_work(
        tl.program_id(0) // (chunks * KV_HEADS),
        starts,
        contexts,
        num_sequences,
        window,
        max_items,
        BLOCK_Q,
        TILE,
        HAS_WINDOW,
        MIN_TILES,
        BLOCK_B,
        True,
    )
    if sequence < 0:
        return
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    m = tl.program_id(0) % chunks * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    query_M = (tl.cdiv(length, BLOCK_Q) - 1 - within) * BLOCK_Q + m // GROUP
    real_M = (m < BLOCK_Q * GROUP) & (query_M < length)
    real_ME = real_M[:, None] & (e < HEAD_DIM)[None, :]
    acc_ME = tl.zeros((ROWS, BLOCK_E), tl.float32)
    highest_M = tl.full((ROWS,), float("-inf"), tl.float32)
    total_M = tl.zeros((ROWS,), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        row_SM = ((slot + within * splits + split).to(tl.int64) * KV_HEADS + kv_head)[:, None]
        row_SM = row_SM * (BLOCK_Q * GROUP) + m[None, :]
        real_SM = (split < splits)[:, None] & real_M[None, :]
        lse_SM = tl.load(partial_lse + row_SM, real_SM, float("-inf"))
        new_M = tl.maximum(highest_M, tl.max(lse_SM, 0))
        level_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weights_SM = tl.exp2(lse_SM - level_M[None, :])
        decay_M = tl.exp2(highest_M - level_M)
        part_SME = tl.load(
            partial_out + row_SM[:, :, None] * HEAD_DIM + e[None, None, :],
            real_SM[:, :, None] & (e < HEAD_DIM)[None, None, :],
            0,
        )
        acc_ME = acc_ME * decay_M[:, None] + tl.sum(part_SME * weights_SM[:, :, None], 0)
        total_M = total_M * decay_M + tl.sum(weights_SM, 0)
        highest_M = new_M
    acc_ME = acc_ME / tl.where(total_M > 0, total_M, 1.0)[:, None]
    out_M = ((start + query_M).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + m % GROUP) * HEAD_DIM
    tl.store(out + out_M[:, None] + e[None, :], acc_ME.to(out.dtype.element_ty), real_ME)
