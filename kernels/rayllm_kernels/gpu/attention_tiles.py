"""What the attention kernels share: which tile of which sequence a program owns, and loading a tile.

Packed layout: sequence b owns rows starts_B1[b] to starts_B1[b + 1]. Rows past the last sequence (padding of a captured
graph) are treated as one more sequence, which has no partner: their results become zeros.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def tile_count(rows: int, sequences: int, block: int) -> int:
    """Programs that suffice for `rows` packed rows, however they fall into sequences: nothing is read from the device.

    Tile numbers of sequence b begin at starts_B1[b] // block + b, which leaves it at least ceil(length / block).
    """
    return rows // block + sequences + 1


@triton.jit
def _begun(
    tile: tl.tensor,
    first: tl.tensor,
    starts_B1: tl.tensor,
    sequences: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> tl.tensor:
    """How many of the BLOCK_B sequences from `first` on begin with `tile` or before it."""
    index = first + tl.arange(0, BLOCK_B)
    starts = tl.load(starts_B1 + index, mask=index <= sequences, other=0)
    return tl.sum(((index <= sequences) & (starts // BLOCK + index <= tile)).to(tl.int32), 0)


@triton.jit
def find_tile(
    tile: tl.tensor,
    starts_B1: tl.tensor,
    sequences: tl.tensor,
    rows: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:
    """Tile number -> (sequence, its first row, its length, first row of the tile within it).

    Surplus tiles begin at or past the length. Looks at BLOCK_B sequences at a time or, AT_ONCE, at all, which are
    fewer then; and nobody returns early on the result: Triton specialises no warps in a kernel with a second loop or
    an early return.
    """
    begun = _begun(tile, 0, starts_B1, sequences, BLOCK, BLOCK_B)
    if not AT_ONCE:
        for first in range(BLOCK_B, sequences + 1, BLOCK_B):
            begun += _begun(tile, first, starts_B1, sequences, BLOCK, BLOCK_B)
    sequence = begun - 1
    start = tl.load(starts_B1 + sequence)
    stop = tl.load(starts_B1 + sequence + 1, mask=sequence < sequences, other=0)
    stop = tl.where(sequence < sequences, stop, rows)
    return sequence, start, stop - start, (tile - start // BLOCK - sequence) * BLOCK


@triton.jit
def find_partner(sequence: tl.tensor, starts_B1: tl.tensor, sequences: tl.tensor) -> tl.tensor:
    """(First row, length) of a sequence on the other side of the attention; none past the last sequence."""
    start = tl.load(starts_B1 + sequence)
    stop = tl.load(starts_B1 + sequence + 1, mask=sequence < sequences, other=0)
    return start, tl.where(sequence < sequences, stop - start, 0)


@triton.jit
def load_tile(
    source: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    left: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """[ROWS, BLOCK_E] from packed row `row`, of which the first `left` belong to the sequence; the others, if MASKED,
    and the columns past HEAD_DIM are zeros: whatever lies there, NaN included, reaches no product.

    `source`: a pointer, or when TMA the descriptor that `describe` makes.
    """
    offsets = tl.arange(0, ROWS)
    if TMA:
        if BLOCK_E == HEAD_DIM:
            tile = source.load([row, head * HEAD_DIM])
        else:
            tile = source.load([row, head, 0]).reshape(ROWS, BLOCK_E)
        if MASKED:
            tile = tl.where((offsets < left)[:, None], tile, 0.0)
    else:
        columns = tl.arange(0, BLOCK_E)
        base = source + row.to(tl.int64) * row_stride + head * head_stride
        pointers = base + offsets[:, None] * row_stride + columns[None, :]
        if MASKED:
            tile = tl.load(pointers, mask=(offsets < left)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        elif BLOCK_E == HEAD_DIM:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    target: tl.tensor,
    tile: tl.tensor,
    row: tl.tensor,
    head: tl.tensor,
    left: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """The counterpart of `load_tile`, by pointer: a descriptor would write into the next sequence's rows."""
    offsets, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    base = target + row.to(tl.int64) * row_stride + head * head_stride
    mask = (offsets < left)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(base + offsets[:, None] * row_stride + columns[None, :], tile.to(target.dtype.element_ty), mask=mask)


@triton.jit
def sees(
    at: tl.tensor, key: tl.tensor, keys: tl.tensor, window: tl.tensor, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
) -> tl.tensor:
    """Whether the query at position `at` among the keys sees key `key`; shapes broadcast. Rows past the queries, whose
    results nobody stores, may see keys past the end."""
    if WINDOW:  # one unsigned comparison holds both bounds
        visible = (at - key).to(tl.uint32, bitcast=True) < window.to(tl.uint32)
    elif CAUSAL:
        visible = key <= at
    else:
        visible = key < keys
    return visible


@triton.jit
def round_down(value: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """To a multiple of BLOCK, nothing below 0."""
    return tl.maximum(value, 0) // BLOCK * BLOCK


@triton.jit
def round_up(value: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    return (tl.maximum(value, 0) + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def key_range(
    row: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    window: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """For the tile of queries at `row`: (begin, full_begin, full_end, end). Keys outside begin to end are seen by none
    of them, those from full_begin to full_end by all. All but the end are multiples of BLOCK_N."""
    shift = keys - queries  # the queries are the sequence's last tokens
    at_first, at_last = row + shift, tl.minimum(row + BLOCK_M, queries) - 1 + shift
    begin, full_begin, full_end, end = 0, 0, round_down(keys, BLOCK_N), keys
    if CAUSAL:
        end = tl.minimum(keys, at_last + 1)
        full_end = round_down(tl.minimum(keys, at_first + 1), BLOCK_N)
    if WINDOW:
        begin = round_down(at_first - window + 1, BLOCK_N)
        full_begin = tl.minimum(round_up(at_last - window + 1, BLOCK_N), round_up(end, BLOCK_N))
        full_end = tl.maximum(full_begin, full_end)
    return begin, full_begin, full_end, end
