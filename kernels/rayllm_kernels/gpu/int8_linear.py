"""`w8a8_linear` and `w8a16_linear` on CUDA: which tiles serve how many rows, the launches, and the ops in torch.

W8A8 is two launches: rows to int8, then one kernel that multiplies, adds the outlier columns and scales. For few rows
W8A16 splits K, and a second launch joins the parts.
"""

import functools
from dataclasses import dataclass
from typing import Any

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
from rayllm_kernels.gpu.spec import Spec

_GROUP = 8
_LEAST_OUTLIERS = 16  # the shortest product that tensor cores take


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
_FLOAT32 = Tiles(t=16, n=32, k=32, num_warps=4, num_stages=1)
_SPLIT_ROWS = 64  # up to here K is split where the tiles alone do not fill the GPU
_PROGRAMS_PER_SM = 2


def tiles_for(table: dict[int, tuple[Tiles, ...]], rows: int) -> Tiles:
    return next(tiles[0] for most, tiles in table.items() if rows <= most)


@torch.library.custom_op("rayllm::row_bounds", mutates_args=())
def row_bounds(x_TK: Tensor, columns_J: Tensor | None) -> Tensor:
    """-> float32 [T, 1]."""
    rows, length = x_TK.shape
    bound_T1 = x_TK.new_empty((rows, 1), dtype=torch.float32)
    block = triton.next_power_of_2(length)
    launch_kernel(
        row_bounds_kernel,
        (rows,),
        x_TK,
        x_TK if columns_J is None else columns_J,
        bound_T1,
        length,
        0 if columns_J is None else columns_J.numel(),
        BLOCK_K=block,
        OUTLIERS=columns_J is not None,
        num_warps=_warps_of_row(block),
    )
    return bound_T1


@row_bounds.register_fake
def _(x_TK: Tensor, columns_J: Tensor | None) -> Tensor:
    return x_TK.new_empty((x_TK.shape[0], 1), dtype=torch.float32)


def _warps_of_row(block: int) -> int:
    return min(max(block // 1024, 4), 32)


@torch.library.custom_op("rayllm::quantize_rows", mutates_args=())
def quantize_rows(x_TK: Tensor, columns_J: Tensor | None, bound_T1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> int8 [T, K], scales [T, 1], what the columns J hold [T, J] in the dtype of x (J may be 0)."""
    rows, length = x_TK.shape
    count = 0 if columns_J is None else columns_J.numel()
    q_TK, scale_T1 = x_TK.new_empty(x_TK.shape, dtype=torch.int8), x_TK.new_empty((rows, 1), dtype=torch.float32)
    kept_TJ = x_TK.new_empty((rows, count))
    block = triton.next_power_of_2(length)
    launch_kernel(
        quantize_rows_kernel,
        (rows,),
        x_TK,
        q_TK,
        scale_T1,
        columns_J if count else x_TK,
        kept_TJ,
        scale_T1 if bound_T1 is None else bound_T1,
        length,
        count,
        BLOCK_K=block,
        BLOCK_J=triton.next_power_of_2(count) if count else 0,
        GIVEN=bound_T1 is not None,
        num_warps=_warps_of_row(block),
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
    return launch_w8a8(
        q_TK, x_scale_T1, weight_NK, scale_N1, bias_N, kept_TJ, outlier_weight_JN, tiles_for(W8A8, len(q_TK))
    )


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
    tiles = _FLOAT32 if x_TK.dtype == torch.float32 else tiles_for(W8A16, rows)
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
        out_TN if bias_N is None else bias_N,
        kept_TJ,
        out_TN if outlier_weight_JN is None else outlier_weight_JN,
        out_TN,
        rows,
        outputs,
        length,
        count,
        BLOCK_T=tiles.t,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        BLOCK_J=0 if count == 0 else min(max(triton.next_power_of_2(count), _LEAST_OUTLIERS), 32),
        GROUP=_GROUP,
        WHOLE_K=length % tiles.k == 0,
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
    bias = out_TN if bias_N is None else bias_N
    launch_kernel(
        w8a16_kernel,
        (triton.cdiv(outputs, tiles.n), triton.cdiv(rows, tiles.t), splits),
        x_TK,
        weight_NK,
        scale_N1,
        bias,
        parts,
        rows,
        outputs,
        length,
        per_split,
        BLOCK_T=tiles.t,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        WHOLE_K=length % tiles.k == 0,
        HAS_BIAS=bias_N is not None,
        SPLIT=splits > 1,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        block = 256
        launch_kernel(
            join_splits_kernel,
            (triton.cdiv(outputs, block), rows),
            parts,
            scale_N1,
            bias,
            out_TN,
            rows,
            outputs,
            splits,
            BLOCK_N=block,
            HAS_BIAS=bias_N is not None,
        )
    return out_TN


def _splits(rows: int, outputs: int, length: int, tiles: Tiles, device: torch.device) -> int:
    """Parts of K that give every multiprocessor its programs, of at least two steps each."""
    if rows > _SPLIT_ROWS:
        return 1
    programs: int = triton.cdiv(outputs, tiles.n) * triton.cdiv(rows, tiles.t)
    wanted = _PROGRAMS_PER_SM * _multiprocessors(device) // programs
    return max(1, min(wanted, length // (2 * tiles.k)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Under the interpreter, which runs on CPU, few: every program costs it a millisecond."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _name(tiles: Tiles, dtype: str, bias: bool, whole_k: bool) -> str:
    how = f"{'' if dtype == 'bf16' else f'_{dtype}'}{'_bias' * bias}{'' if whole_k else '_ragged'}"
    return f"{tiles.t}x{tiles.n}x{tiles.k}_w{tiles.num_warps}_s{tiles.num_stages}{how}"


def _spec_w8a8(tiles: Tiles, *, outliers: bool, dtype: str = "bf16", bias: bool = False, whole_k: bool = True) -> Spec:
    pointers = {
        "q_ptr": "*i8",
        "weight_ptr": "*i8",
        "x_scale_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "bias_ptr": f"*{dtype}",
        "kept_ptr": f"*{dtype}",
        "outlier_ptr": "*bf16",
        "out_ptr": f"*{dtype}",
    }
    constexprs: dict[str, object] = {
        "BLOCK_T": tiles.t,
        "BLOCK_N": tiles.n,
        "BLOCK_K": tiles.k,
        "BLOCK_J": 16 if outliers else 0,
        "GROUP": _GROUP,
        "WHOLE_K": whole_k,
        "HAS_BIAS": bias,
    }
    return Spec(
        name=f"w8a8_{_name(tiles, dtype, bias, whole_k)}{'_mixed' * outliers}",
        kernel=w8a8_kernel,
        signature=pointers | dict.fromkeys(("T", "N", "K", "J"), "i32") | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*pointers, "N", "K", "J"),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        expects=frozenset({"igmma"}) if tiles.t >= 64 else frozenset(),
    )


def _spec_w8a16(tiles: Tiles, *, split: bool, dtype: str = "bf16", bias: bool = False, whole_k: bool = True) -> Spec:
    pointers = {
        "x_ptr": f"*{dtype}",
        "weight_ptr": "*i8",
        "scale_ptr": "*fp32",
        "bias_ptr": f"*{dtype}",
        "out_ptr": "*fp32" if split else f"*{dtype}",
    }
    constexprs: dict[str, object] = {
        "BLOCK_T": tiles.t,
        "BLOCK_N": tiles.n,
        "BLOCK_K": tiles.k,
        "WHOLE_K": whole_k,
        "HAS_BIAS": bias,
        "SPLIT": split,
    }
    numbers = ("T", "N", "K", "K_PER_SPLIT")
    return Spec(
        name=f"w8a16_{_name(tiles, dtype, bias, whole_k)}{'_split' * split}",
        kernel=w8a16_kernel,
        signature=pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*pointers, "N", "K", "K_PER_SPLIT"),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        expects=frozenset({"wgmma"}) if tiles.t >= 64 else frozenset(),
    )


def _spec_quantize(*, outliers: bool, given: bool) -> Spec:
    pointers = {
        "x_ptr": "*bf16",
        "q_ptr": "*i8",
        "scale_ptr": "*fp32",
        "columns_ptr": "*i32",
        "kept_ptr": "*bf16",
        "bound_ptr": "*fp32",
    }
    constexprs: dict[str, object] = {"BLOCK_K": 4096, "BLOCK_J": 16 if outliers else 0, "GIVEN": given}
    return Spec(
        name=f"quantize_rows_4096{'_mixed' * outliers}{'_given' * given}",
        kernel=quantize_rows_kernel,
        signature=pointers | {"K": "i32", "J": "i32"} | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*pointers, "K"),
        num_warps=4,
        num_stages=1,
        expects=frozenset(),
    )


def _spec_bounds(*, outliers: bool) -> Spec:
    pointers = {"x_ptr": "*bf16", "columns_ptr": "*i32", "bound_ptr": "*fp32"}
    constexprs: dict[str, object] = {"BLOCK_K": 4096, "OUTLIERS": outliers}
    return Spec(
        name=f"row_bounds_4096{'_mixed' * outliers}",
        kernel=row_bounds_kernel,
        signature=pointers | {"K": "i32", "J": "i32"} | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*pointers, "K"),
        num_warps=4,
        num_stages=1,
        expects=frozenset(),
    )


def _spec_join() -> Spec:
    pointers = {"sums_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    constexprs: dict[str, object] = {"BLOCK_N": 256, "HAS_BIAS": False}
    return Spec(
        name="w8a16_join_splits",
        kernel=join_splits_kernel,
        signature=pointers | dict.fromkeys(("T", "N", "splits"), "i32") | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*pointers, "N"),
        num_warps=4,
        num_stages=1,
        expects=frozenset(),
    )


def _specs() -> list[Spec]:
    w8a8 = [tiles for choices in W8A8.values() for tiles in choices]
    w8a16 = [(tiles, most <= _SPLIT_ROWS) for most, choices in W8A16.items() for tiles in choices]
    # Of the tiles in use what else a model may ask of them; K need not be a multiple of theirs
    others: tuple[dict[str, Any], ...] = ({"dtype": "fp16"}, {"bias": True}, {"whole_k": False})
    small = [most for most in W8A16 if most <= _SPLIT_ROWS]
    return [
        *(_spec_w8a8(tiles, outliers=outliers) for tiles in w8a8 for outliers in (False, True)),
        *(_spec_w8a16(tiles, split=split) for tiles, split in w8a16),
        *(_spec_w8a8(tiles_for(W8A8, most), outliers=True, **other) for most in W8A8 for other in others),
        *(_spec_w8a16(tiles_for(W8A16, most), split=False, **other) for most in W8A16 for other in others),
        *(_spec_w8a16(tiles_for(W8A16, most), split=True, **other) for most in small for other in others),
        *(_spec_w8a16(_FLOAT32, split=split, dtype="fp32") for split in (False, True)),
        *(_spec_quantize(outliers=outliers, given=given) for outliers in (False, True) for given in (False, True)),
        *(_spec_bounds(outliers=outliers) for outliers in (False, True)),
        _spec_join(),
    ]


SPECS = _specs()
