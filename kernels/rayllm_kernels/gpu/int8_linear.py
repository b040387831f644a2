"""`w8a8_linear` and `w8a16_linear` on CUDA: which tiles serve how many rows, the launches, and the ops in torch.

W8A8 is two launches: rows to int8, then one kernel that multiplies, adds the outlier columns and scales (those of
float32 torch adds). For few rows W8A16 splits K, and a second launch joins the parts.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rayllm_kernels.gpu.int8_linear_kernels import (
    join_splits_kernel,
    quantize_rows_kernel,
    row_bounds_kernel,
    w8a8_kernel,
    w8a16_kernel,
)
from rayllm_kernels.gpu.launch import launch_kernel

GROUP = 8
OUTLIERS_AT_ONCE = 32  # columns at a time, however many there are: one binary serves any number
SHORTEST, LONGEST = 1024, 16384  # of a row, what a program holds of it; above, rows are read twice, or would spill


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    t: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# By the most rows: the first serves, the others are for the benchmark to compare. None has run on a GPU; the order is
# by registers, shared memory and bytes in flight of what the compiler makes of them.
W8A8: dict[int, tuple[Tiles, ...]] = {
    16: (
        Tiles(t=16, n=64, k=256, num_warps=4, num_stages=5),
        Tiles(t=16, n=32, k=256, num_warps=4, num_stages=6),
    ),
    32: (Tiles(t=32, n=64, k=256, num_warps=4, num_stages=4),),
    64: (
        Tiles(t=64, n=128, k=128, num_warps=4, num_stages=4),
        Tiles(t=64, n=64, k=128, num_warps=4, num_stages=5),
    ),
    1 << 62: (
        Tiles(t=128, n=256, k=128, num_warps=8, num_stages=3),
        Tiles(t=128, n=128, k=128, num_warps=8, num_stages=4),
        Tiles(t=128, n=128, k=128, num_warps=8, num_stages=3),
    ),
}
W8A16: dict[int, tuple[Tiles, ...]] = {
    16: (
        Tiles(t=16, n=64, k=128, num_warps=4, num_stages=5),
        Tiles(t=16, n=128, k=128, num_warps=4, num_stages=4),
    ),
    64: (Tiles(t=64, n=64, k=128, num_warps=4, num_stages=4), Tiles(t=64, n=128, k=64, num_warps=4, num_stages=4)),
    1 << 62: (
        Tiles(t=128, n=128, k=64, num_warps=8, num_stages=4),
        Tiles(t=64, n=128, k=64, num_warps=4, num_stages=4),
    ),
}
# 32-bit products run on the ordinary cores; they are there for checks, not for speed.
FLOAT32 = Tiles(t=16, n=32, k=32, num_warps=4, num_stages=1)
ODD_OUTLIERS = W8A8[1 << 62][1]
SPLIT_ROWS = 64  # up to here K is split where the tiles alone do not fill the GPU
_PROGRAMS_PER_SM = 2
JOINED = 256  # outputs by one program


def tiles_for(table: dict[int, tuple[Tiles, ...]], rows: int) -> Tiles:
    return next(tiles[0] for most, tiles in table.items() if rows <= most)


def w8a8_tiles(rows: int, outputs: int, *, outliers: bool) -> Tiles:
    """Those in use, and smaller ones where the products of outlier columns would spill: outputs that are no multiple of
    16 are read one by one."""
    tiles = tiles_for(W8A8, rows)
    return ODD_OUTLIERS if outliers and outputs % 16 and tiles.n > ODD_OUTLIERS.n else tiles


@torch.library.custom_op("rayllm::row_bounds", mutates_args=())
def row_bounds(x_TK: Tensor, columns_J: Tensor | None) -> Tensor:
    """-> float32 [T, 1]."""
    rows, length = x_TK.shape
    bound_T1 = x_TK.new_empty((rows, 1), dtype=torch.float32)
    tile = row_tile(length)
    launch_kernel(
        row_bounds_kernel,
        (rows,),
        x_TK,
        columns_J,
        bound_T1,
        length,
        0 if columns_J is None else columns_J.numel(),
        **tile,
        OUTLIERS=columns_J is not None,
        num_warps=warps_of_row(tile["BLOCK_K"]),
    )
    return bound_T1


@row_bounds.register_fake
def _(x_TK: Tensor, columns_J: Tensor | None) -> Tensor:
    return x_TK.new_empty((x_TK.shape[0], 1), dtype=torch.float32)


def row_tile(length: int) -> dict[str, int]:
    """The compile-time arguments that say how much of a row a program holds."""
    block: int = min(max(triton.next_power_of_2(length), SHORTEST), LONGEST)
    return {"BLOCK_K": block, "WHOLE_ROW": length <= block}


def warps_of_row(block: int) -> int:
    return max(block // 1024, 4)


@torch.library.custom_op("rayllm::quantize_rows", mutates_args=())
def quantize_rows(x_TK: Tensor, columns_J: Tensor | None, bound_T1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> int8 [T, K], scales [T, 1], what the columns J hold [T, J] in the dtype of x (J may be 0)."""
    rows, length = x_TK.shape
    count = 0 if columns_J is None else columns_J.numel()
    q_TK, scale_T1 = x_TK.new_empty(x_TK.shape, dtype=torch.int8), x_TK.new_empty((rows, 1), dtype=torch.float32)
    kept_TJ = x_TK.new_empty((rows, count))
    tile = row_tile(length)
    launch_kernel(
        quantize_rows_kernel,
        (rows,),
        x_TK,
        q_TK,
        scale_T1,
        columns_J if count else None,
        kept_TJ if count else None,
        bound_T1,
        length,
        count,
        **tile,
        BLOCK_J=OUTLIERS_AT_ONCE,
        OUTLIERS=count > 0,
        GIVEN=bound_T1 is not None,
        num_warps=warps_of_row(tile["BLOCK_K"]),
    )
    return q_TK, scale_T1, kept_TJ


@quantize_rows.register_fake
def _(x_TK: Tensor, columns_J: Tensor | None, bound_T1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, count = x_TK.shape[0], 0 if columns_J is None else columns_J.numel()
    q_TK, scale_T1 = x_TK.new_empty(x_TK.shape, dtype=torch.int8), x_TK.new_empty((rows, 1), dtype=torch.float32)
    return q_TK, scale_T1, x_TK.new_empty((rows, count))


@torch.library.custom_op("rayllm::w8a8_product", mutates_args=())
def w8a8_product(
    q_TK: Tensor,
    x_scale_T1: Tensor,
    weight_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    kept_TJ: Tensor,
    outlier_weight_JN: Tensor | None,
) -> Tensor:
    """-> [T, N] in the dtype of `kept_TJ`, which is that of x."""
    rows, outputs, outliers = len(q_TK), len(weight_NK), kept_TJ.shape[1] > 0
    if outlier_weight_JN is not None and outliers and kept_TJ.dtype == torch.float32:
        # Products of 32 bits run on the ordinary cores: beside those of int8 they leave no tile that fills tensor cores
        none = kept_TJ[:, :0]
        out_TN = launch_w8a8(q_TK, x_scale_T1, weight_NK, scale_N1, bias_N, none, None, tiles_for(W8A8, rows))
        return out_TN.addmm_(kept_TJ, outlier_weight_JN.float())
    tiles = w8a8_tiles(rows, outputs, outliers=outliers)
    return launch_w8a8(q_TK, x_scale_T1, weight_NK, scale_N1, bias_N, kept_TJ, outlier_weight_JN, tiles)


@w8a8_product.register_fake
def _(
    q_TK: Tensor,
    x_scale_T1: Tensor,
    weight_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    kept_TJ: Tensor,
    outlier_weight_JN: Tensor | None,
) -> Tensor:
    return kept_TJ.new_empty((q_TK.shape[0], weight_NK.shape[0]))


@torch.library.custom_op("rayllm::w8a16_product", mutates_args=())
def w8a16_product(x_TK: Tensor, weight_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """-> [T, N] in the dtype of x."""
    rows, length = x_TK.shape
    tiles = FLOAT32 if x_TK.dtype == torch.float32 else tiles_for(W8A16, rows)
    return launch_w8a16(
        x_TK, weight_NK, scale_N1, bias_N, tiles, _splits(rows, len(weight_NK), length, tiles, x_TK.device)
    )


@w8a16_product.register_fake
def _(x_TK: Tensor, weight_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_TK.new_empty((x_TK.shape[0], weight_NK.shape[0]))


def launch_w8a8(
    q_TK: Tensor,
    x_scale_T1: Tensor,
    weight_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    kept_TJ: Tensor,
    outlier_weight_JN: Tensor | None,
    tiles: Tiles,
) -> Tensor:
    (rows, length), outputs, count = q_TK.shape, len(weight_NK), kept_TJ.shape[1]
    out_TN = kept_TJ.new_empty((rows, outputs))
    launch_kernel(
        w8a8_kernel,
        (triton.cdiv(rows, tiles.t) * triton.cdiv(outputs, tiles.n),),
        q_TK,
        weight_NK,
        x_scale_T1,
        scale_N1,
        bias_N,
        kept_TJ if count else None,
        outlier_weight_JN if count else None,
        out_TN,
        rows,
        outputs,
        length,
        count,
        BLOCK_T=tiles.t,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        BLOCK_J=OUTLIERS_AT_ONCE,
        GROUP=GROUP,
        WHOLE_K=length % tiles.k == 0,
        OUTLIERS=count > 0,
        HAS_BIAS=bias_N is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out_TN


def launch_w8a16(
    x_TK: Tensor, weight_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None, tiles: Tiles, splits: int
) -> Tensor:
    (rows, length), outputs = x_TK.shape, len(weight_NK)
    out_TN = x_TK.new_empty((rows, outputs))
    per_split = triton.cdiv(triton.cdiv(length, splits), tiles.k) * tiles.k
    splits = triton.cdiv(length, per_split)
    parts = x_TK.new_empty((splits, rows, outputs), dtype=torch.float32) if splits > 1 else out_TN
    launch_kernel(
        w8a16_kernel,
        (triton.cdiv(outputs, tiles.n), triton.cdiv(rows, tiles.t), splits),
        x_TK,
        weight_NK,
        scale_N1,
        None if splits > 1 else bias_N,
        parts,
        rows,
        outputs,
        length,
        per_split,
        BLOCK_T=tiles.t,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        WHOLE_K=length % tiles.k == 0,
        HAS_BIAS=bias_N is not None and splits == 1,
        SPLIT=splits > 1,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        launch_kernel(
            join_splits_kernel,
            (triton.cdiv(outputs, JOINED), rows),
            parts,
            scale_N1,
            bias_N,
            out_TN,
            rows,
            outputs,
            splits,
            BLOCK_N=JOINED,
            HAS_BIAS=bias_N is not None,
        )
    return out_TN


def _splits(rows: int, outputs: int, length: int, tiles: Tiles, device: torch.device) -> int:
    """Parts of K that give every multiprocessor its programs, of at least two steps each."""
    if rows > SPLIT_ROWS:
        return 1
    programs: int = triton.cdiv(outputs, tiles.n) * triton.cdiv(rows, tiles.t)
    wanted = _PROGRAMS_PER_SM * _multiprocessors(device) // programs
    return max(1, min(wanted, length // (2 * tiles.k)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Under the interpreter, which runs on CPU, few: every program costs it a millisecond."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
