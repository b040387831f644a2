"""What the compile gate builds of `int8_linear`'s kernels: of the tiles in use whatever a model may ask of them."""

from itertools import product
from typing import Any

from triton.runtime import JITFunction

from rayllm_kernels.gpu.int8_linear import (
    FLOAT32,
    GROUP,
    JOINED,
    LONGEST,
    OUTLIERS_AT_ONCE,
    SHORTEST,
    SPLIT_ROWS,
    W8A8,
    W8A16,
    Tiles,
    row_tile,
    tiles_for,
    w8a8_tiles,
    warps_of_row,
)
from rayllm_kernels.gpu.int8_linear_kernels import (
    join_splits_kernel,
    quantize_rows_kernel,
    row_bounds_kernel,
    w8a8_kernel,
    w8a16_kernel,
)
from rayllm_kernels.gpu.spec import Spec


def _spec(
    name: str,
    kernel: JITFunction,
    pointers: dict[str, str | None],
    integers: dict[str, bool],
    constexprs: dict[str, object],
    *,
    num_warps: int,
    num_stages: int = 3,  # what a launch that names none gets
    expects: frozenset[str] = frozenset(),
) -> Spec:
    """`pointers`: the type, or None for a tensor that is not there. `integers`: whether it is a multiple of 16."""
    given = {name: kind for name, kind in pointers.items() if kind is not None}
    constexprs = constexprs | {name: None for name in pointers if name not in given}
    return Spec(
        name=name,
        kernel=kernel,
        signature=given | dict.fromkeys(integers, "i32") | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*given, *(name for name, aligned in integers.items() if aligned)),
        num_warps=num_warps,
        num_stages=num_stages,
        expects=expects,
    )


def _name(tiles: Tiles, dtype: str, bias: bool, whole_k: bool, odd_n: bool) -> str:
    how = f"{'' if dtype == 'bf16' else f'_{dtype}'}{'_bias' * bias}{'' if whole_k else '_ragged'}{'_odd' * odd_n}"
    return f"{tiles.t}x{tiles.n}x{tiles.k}_w{tiles.num_warps}_s{tiles.num_stages}{how}"


def _spec_w8a8(
    tiles: Tiles,
    *,
    outliers: bool,
    dtype: str = "bf16",
    bias: bool = False,
    whole_k: bool = True,
    odd_n: bool = False,
) -> Spec:
    return _spec(
        f"w8a8_{_name(tiles, dtype, bias, whole_k, odd_n)}{'_mixed' * outliers}",
        w8a8_kernel,
        {
            "q_ptr": "*i8",
            "weight_ptr": "*i8",
            "x_scale_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "bias_ptr": f"*{dtype}" if bias else None,
            "kept_ptr": f"*{dtype}" if outliers else None,
            "outlier_ptr": "*bf16" if outliers else None,
            "out_ptr": f"*{dtype}",
        },
        {"T": False, "N": not odd_n, "K": True, "J": False},
        {
            "BLOCK_T": tiles.t,
            "BLOCK_N": tiles.n,
            "BLOCK_K": tiles.k,
            "BLOCK_J": OUTLIERS_AT_ONCE,
            "GROUP": GROUP,
            "WHOLE_K": whole_k,
            "OUTLIERS": outliers,
            "HAS_BIAS": bias,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        expects=frozenset({"igmma"}) if tiles.t >= 64 else frozenset(),
    )


def _spec_w8a16(
    tiles: Tiles,
    *,
    split: bool,
    dtype: str = "bf16",
    bias: bool = False,
    whole_k: bool = True,
    odd_n: bool = False,
) -> Spec:
    return _spec(
        f"w8a16_{_name(tiles, dtype, bias, whole_k, odd_n)}{'_split' * split}",
        w8a16_kernel,
        {
            "x_ptr": f"*{dtype}",
            "weight_ptr": "*i8",
            "scale_ptr": "*fp32",
            "bias_ptr": f"*{dtype}" if bias else None,
            "out_ptr": "*fp32" if split else f"*{dtype}",
        },
        {"T": False, "N": not odd_n, "K": True, "K_PER_SPLIT": True},
        {
            "BLOCK_T": tiles.t,
            "BLOCK_N": tiles.n,
            "BLOCK_K": tiles.k,
            "WHOLE_K": whole_k,
            "HAS_BIAS": bias,
            "SPLIT": split,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        expects=frozenset({"wgmma"}) if tiles.t >= 64 else frozenset(),
    )


def _spec_quantize(length: int, *, dtype: str, outliers: bool, given: bool) -> Spec:
    tile = row_tile(length)
    return _spec(
        f"quantize_rows_{length}_{dtype}{'_mixed' * outliers}{'_given' * given}",
        quantize_rows_kernel,
        {
            "x_ptr": f"*{dtype}",
            "q_ptr": "*i8",
            "scale_ptr": "*fp32",
            "columns_ptr": "*i32" if outliers else None,
            "kept_ptr": f"*{dtype}" if outliers else None,
            "bound_ptr": "*fp32" if given else None,
        },
        {"K": True, "J": False},
        {**tile, "BLOCK_J": OUTLIERS_AT_ONCE, "OUTLIERS": outliers, "GIVEN": given},
        num_warps=warps_of_row(tile["BLOCK_K"]),
    )


def _spec_bounds(length: int, *, dtype: str, outliers: bool) -> Spec:
    tile = row_tile(length)
    return _spec(
        f"row_bounds_{length}_{dtype}{'_mixed' * outliers}",
        row_bounds_kernel,
        {"x_ptr": f"*{dtype}", "columns_ptr": "*i32" if outliers else None, "bound_ptr": "*fp32"},
        {"K": True, "J": False},
        {**tile, "OUTLIERS": outliers},
        num_warps=warps_of_row(tile["BLOCK_K"]),
    )


def _spec_join(*, dtype: str, bias: bool, odd_n: bool) -> Spec:
    return _spec(
        f"w8a16_join_splits_{dtype}{'_bias' * bias}{'_odd' * odd_n}",
        join_splits_kernel,
        {
            "sums_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "bias_ptr": f"*{dtype}" if bias else None,
            "out_ptr": f"*{dtype}",
        },
        {"T": False, "N": not odd_n, "splits": False},
        {"BLOCK_N": JOINED, "HAS_BIAS": bias},
        num_warps=4,
    )


def _specs() -> list[Spec]:
    """Of the tiles that are not in use, what the benchmark compares."""
    dtypes, flags = ("bf16", "fp16", "fp32"), (False, True)
    specs = [_spec_w8a8(tiles, outliers=mixed) for choices in W8A8.values() for tiles in choices[1:] for mixed in flags]
    for most, choices in W8A16.items():
        specs += [_spec_w8a16(tiles, split=most <= SPLIT_ROWS) for tiles in choices[1:]]
    # K need not be a multiple of the tiles', nor N of 16
    for dtype, whole_k, odd_n in product(dtypes, flags, flags):
        shape: dict[str, Any] = {"dtype": dtype, "whole_k": whole_k, "odd_n": odd_n}
        for mixed in (False,) if dtype == "fp32" else flags:
            served = dict.fromkeys(w8a8_tiles(most, 8 if odd_n else 16, outliers=mixed) for most in W8A8)
            specs += [_spec_w8a8(tiles, outliers=mixed, bias=bias, **shape) for tiles in served for bias in flags]
        widths = [(FLOAT32, True)] if dtype == "fp32" else [(tiles_for(W8A16, m), m <= SPLIT_ROWS) for m in W8A16]
        for tiles, may_split in widths:
            specs += [_spec_w8a16(tiles, split=False, bias=bias, **shape) for bias in flags]
            specs += [_spec_w8a16(tiles, split=True, **shape)] * may_split
    lengths = [1 << n for n in range(SHORTEST.bit_length() - 1, LONGEST.bit_length() + 1)]  # the last one's in parts
    for length, dtype, mixed in product(lengths, dtypes, flags):
        specs += [_spec_quantize(length, dtype=dtype, outliers=mixed, given=given) for given in flags]
        specs.append(_spec_bounds(length, dtype=dtype, outliers=mixed))
    return [*specs, *(_spec_join(dtype=d, bias=b, odd_n=o) for d, b, o in product(dtypes, flags, flags))]


SPECS = _specs()
