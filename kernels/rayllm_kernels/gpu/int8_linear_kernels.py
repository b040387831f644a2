"""The Triton kernels behind `int8_linear` on CUDA; what they compute is said there. Letters as there.

Everything but the products is in float32. Offsets into matrices are 64-bit where a row number is in them.
"""

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest, ties to even
_TINY = tl.constexpr(1e-30)


@triton.jit
def largest_magnitude(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """NaN where there is one: the order of non-negative floats is that of their bits, and NaN is above all of them."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def to_int8(x: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """`bound`, which is to become 127, in a shape that x broadcasts with."""
    counts = bound > _TINY  # false for NaN, whose row the scale makes NaN
    factor = 127.0 / tl.where(counts, bound, 1.0)
    return tl.where(counts, (x * factor + _ROUND) - _ROUND, 0.0).to(tl.int8)


@triton.jit
def _load_row(
    row_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    k: tl.tensor,
    K: tl.tensor,
    J: tl.tensor,
    OUTLIERS: tl.constexpr,
) -> tl.tensor:
    """Columns k in float32, zero past the row's end and in the J outlier columns."""
    x = tl.load(row_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if OUTLIERS:
        for one in range(J):
            x = tl.where(k == tl.load(columns_ptr + one), 0.0, x)
    return x


@triton.jit
def _bound_of_long_row(
    row_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    K: tl.tensor,
    J: tl.tensor,
    BLOCK_K: tl.constexpr,
    OUTLIERS: tl.constexpr,
) -> tl.tensor:
    """`largest_magnitude` of a row that is longer than BLOCK_K."""
    largest = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        x = _load_row(row_ptr, columns_ptr, start + tl.arange(0, BLOCK_K), K, J, OUTLIERS)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(largest, axis=0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["J"])
def quantize_rows_kernel(
    x_ptr: tl.tensor,
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    K: tl.tensor,
    J: tl.tensor,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    OUTLIERS: tl.constexpr,
    GIVEN: tl.constexpr,
) -> None:
    """A program for each row. WHOLE_ROW: it is held at once, else read twice. GIVEN: its bound is read, not found."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * K
    if OUTLIERS:
        for start in range(0, J, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            column = tl.load(columns_ptr + j, mask=j < J, other=0)
            kept = tl.load(row_ptr + column, mask=j < J, other=0.0)
            tl.store(kept_ptr + row * J + j, kept, mask=j < J)
    k = tl.arange(0, BLOCK_K)
    if WHOLE_ROW:
        x = _load_row(row_ptr, columns_ptr, k, K, J, OUTLIERS)
        bound = tl.load(bound_ptr + row) if GIVEN else largest_magnitude(x, 0)
        tl.store(q_ptr + row * K + k, to_int8(x, bound), mask=k < K)
    else:
        bound = tl.load(bound_ptr + row) if GIVEN else _bound_of_long_row(row_ptr, columns_ptr, K, J, BLOCK_K, OUTLIERS)
        for start in range(0, K, BLOCK_K):
            x = _load_row(row_ptr, columns_ptr, start + k, K, J, OUTLIERS)
            tl.store(q_ptr + row * K + start + k, to_int8(x, bound), mask=start + k < K)
    tl.store(scale_ptr + row, bound / 127.0)


@triton.jit(do_not_specialize=["J"])
def row_bounds_kernel(
    x_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    K: tl.tensor,
    J: tl.tensor,
    BLOCK_K: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    OUTLIERS: tl.constexpr,
) -> None:
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * K
    if WHOLE_ROW:
        bound = largest_magnitude(_load_row(row_ptr, columns_ptr, tl.arange(0, BLOCK_K), K, J, OUTLIERS), 0)
    else:
        bound = _bound_of_long_row(row_ptr, columns_ptr, K, J, BLOCK_K, OUTLIERS)
    tl.store(bound_ptr + row, bound)


@triton.jit(do_not_specialize=["T", "J"])
def w8a8_kernel(
    q_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    outlier_ptr: tl.tensor,
    out_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    J: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    OUTLIERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """A program for each tile of the output: int8 along K, then 16 bits along J, then one epilogue."""
    # GROUP tiles of rows take turns over the columns, so that both operands are met again while in the cache
    tiles_t, tiles_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    size = min(tiles_t - group * GROUP, GROUP)
    first = (group * GROUP + program % (GROUP * tiles_n) % size) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)
    n = (program % (GROUP * tiles_n) // size) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the first ones, and are never stored
    rows = (t % T).to(tl.int64)
    outputs = (n % N).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    q_ptrs = q_ptr + rows[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + outputs[None, :] * K + k[:, None]
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if WHOLE_K:
            q = tl.load(q_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            q = tl.load(q_ptrs, mask=k[None, :] < K - start, other=0)
            weight = tl.load(weight_ptrs, mask=k[:, None] < K - start, other=0)
        sums = tl.dot(q, weight, sums, out_dtype=tl.int32)
        q_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    x_scale = tl.load(x_scale_ptr + rows)
    scale = tl.load(scale_ptr + outputs)
    out = sums.to(tl.float32) * x_scale[:, None] * scale[None, :]
    if OUTLIERS:
        j = tl.arange(0, BLOCK_J)
        for start in range(0, J, BLOCK_J):
            inside = j < J - start
            kept = tl.load(kept_ptr + rows[:, None] * J + (start + j)[None, :], mask=inside[None, :], other=0.0)
            outlier = tl.load(
                outlier_ptr + (start + j).to(tl.int64)[:, None] * N + outputs[None, :], mask=inside[:, None], other=0.0
            )
            out = tl.dot(kept, outlier.to(kept.dtype), out)
    if HAS_BIAS:
        out += tl.load(bias_ptr + outputs).to(tl.float32)[None, :]
    # Within a tile 32 bits do, and half of the registers that hold addresses where 16 does not divide N
    targets = out_ptr + first.to(tl.int64) * N + (tl.arange(0, BLOCK_T)[:, None] * N + n[None, :])
    tl.store(targets, out.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["T"])
def w8a16_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    K_PER_SPLIT: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """A program for each tile of the output and part of K. The weight is the left operand, so that it may stay in
    registers once widened. SPLIT: float32 sums to out [splits, T, N], else the output itself."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    rows = (t % T).to(tl.int64)
    outputs = (n % N).to(tl.int64)
    begin = split * K_PER_SPLIT
    end = min(begin + K_PER_SPLIT, K)
    k = begin + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[None, :] * K + k[:, None]
    weight_ptrs = weight_ptr + outputs[:, None] * K + k[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(begin, end, BLOCK_K):
        if WHOLE_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inside = start + tl.arange(0, BLOCK_K) < end
            x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=inside[None, :], other=0)
        sums = tl.dot(weight.to(x.dtype), x, sums, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    targets = out_ptr + first.to(tl.int64) * N + (tl.arange(0, BLOCK_T)[None, :] * N + n[:, None])
    inside = (t < T)[None, :] & (n < N)[:, None]
    if SPLIT:
        tl.store(targets + split.to(tl.int64) * T * N, sums, mask=inside)
    else:
        out = sums * tl.load(scale_ptr + outputs)[:, None]
        if HAS_BIAS:
            out += tl.load(bias_ptr + outputs).to(tl.float32)[:, None]
        tl.store(targets, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "splits"])
def join_splits_kernel(
    sums_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    splits: tl.tensor,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """A program for some outputs of one row. Always in the same order, so the result does not depend on timing."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    parts = sums_ptr + row * N + n
    for _ in range(splits):
        total += tl.load(parts, mask=n < N, other=0.0)
        parts += T * N
    out = total * tl.load(scale_ptr + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)
