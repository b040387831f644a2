"""Into which tiles flash attention is cut, by head size and device; `SPECS` has all of them compiled for sm_90."""

from dataclasses import dataclass
from itertools import product

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from rayllm_kernels.gpu.flash_attention_backward import (
    flash_attention_delta_kernel,
    flash_attention_dkdv_kernel,
    flash_attention_dq_kernel,
)
from rayllm_kernels.gpu.flash_attention_forward import flash_attention_forward_kernel
from rayllm_kernels.gpu.spec import Spec

DELTA_ROWS, DELTA_WARPS = 64, 4
# Among BLOCK_B sequences at a time a program looks for its own, so one binary serves any number of them. With more at
# once dkdv spills (from 32 on, triton 3.6), and the specialized form, which needs all at once, does not compile.
BLOCK_B, MOST_AT_ONCE = 16, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a kernel cuts its work: `block_m` queries by `block_n` keys. `tma`: tiles are loaded through descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool
    warp_specialize: bool = False

    def __str__(self) -> str:
        how = ("tma" if self.tma else "pointers") + (" specialized" if self.warp_specialize else "")
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages} {how}"

    def constexprs(self, *, head_dim: int, sequences: int, causal: bool, window: bool) -> dict[str, int | bool]:
        """What all kernels but delta are compiled for; the specialized form depends on the number of sequences."""
        if self.warp_specialize and sequences >= MOST_AT_ONCE:
            raise ValueError(f"{sequences} sequences: the specialized form takes less than {MOST_AT_ONCE}")
        return {
            "HEAD_DIM": head_dim,
            "BLOCK_E": block_e(head_dim),
            "BLOCK_B": triton.next_power_of_2(sequences + 1) if self.warp_specialize else BLOCK_B,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "CAUSAL": causal,
            "WINDOW": window,
            "TMA": self.tma,
        }


def block_e(head_dim: int) -> int:
    """Columns of a tile: Triton's are powers of two; narrower ones would be further binaries that no model needs."""
    return max(64, int(triton.next_power_of_2(head_dim)))


def _tma(block_m: int, block_n: int, num_warps: int, num_stages: int, *, warp_specialize: bool = False) -> Tiling:
    return Tiling(
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        tma=True,
        warp_specialize=warp_specialize,
    )


def _pointers(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Tiling:
    return Tiling(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, tma=False)


Table = dict[int, tuple[Tiling, ...]]
# For sm_90, by head size. The first of each is used; the others are for the benchmark to compare: none has run on a GPU
# yet, the order is by registers and shared memory. Tiles of head sizes 80 and 96 are 128 columns wide: out of a
# descriptor they would pass through registers, by pointer they are copied past them, with zeros for the rest.
_FORWARD_96 = (_pointers(128, 64, 8, 2), _tma(128, 128, 8, 2), _pointers(64, 64, 4, 2))
_BACKWARD_KV_96 = (_pointers(16, 128, 8, 2), _pointers(16, 64, 8, 2))
_BACKWARD_Q_96 = (_pointers(128, 32, 8, 3), _pointers(64, 64, 4, 2))
FORWARD: Table = {
    64: (_tma(128, 128, 8, 2), _tma(128, 64, 4, 3), _tma(64, 128, 4, 2, warp_specialize=True)),
    80: _FORWARD_96,
    96: _FORWARD_96,
    128: (_tma(128, 128, 8, 2), _tma(128, 64, 8, 3), _tma(64, 128, 4, 2, warp_specialize=True)),
    256: (_tma(128, 32, 8, 3), _tma(128, 32, 8, 2)),
}
BACKWARD_KV: Table = {
    64: (_tma(32, 128, 8, 2), _tma(32, 128, 8, 3)),
    80: _BACKWARD_KV_96,
    96: _BACKWARD_KV_96,
    128: (_tma(32, 128, 8, 2), _tma(16, 128, 8, 3), _tma(32, 64, 4, 2)),
    256: (_tma(16, 64, 8, 2),),
}
BACKWARD_Q: Table = {
    64: (_tma(128, 64, 8, 2), _tma(64, 64, 4, 2)),
    80: _BACKWARD_Q_96,
    96: _BACKWARD_Q_96,
    128: (_tma(128, 64, 8, 2), _tma(128, 64, 8, 3), _tma(64, 64, 4, 2)),
    256: (_tma(64, 16, 8, 2),),
}
# Other devices and head sizes, up to 128 and above: at most 99 KB of shared memory, which all from sm_80 on have.
_PORTABLE = (_pointers(64, 32, 4, 2), _pointers(32, 32, 4, 1))
_PORTABLE_KV = (_pointers(16, 64, 8, 2), _pointers(16, 32, 8, 1))


def tiling(table: Table, x_THE: Tensor) -> Tiling:
    """What serves x's device and head size. On CPU the interpreter runs, for which the portable tiles suit."""
    head_dim = x_THE.shape[2]
    if _on_sm_90(x_THE):
        alike = 96 if 64 < head_dim < 128 else head_dim  # as wide, and by pointer
        if alike in table:
            return table[alike][0]
    return _portable(table, head_dim)


def _on_sm_90(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


def _portable(table: Table, head_dim: int) -> Tiling:
    narrow, wide = _PORTABLE_KV if table is BACKWARD_KV else _PORTABLE
    return narrow if head_dim <= 128 else wide


def _tile_type(dtype: str, rows: int, head_dim: int, tma: bool) -> str:
    if not tma:
        return f"*{dtype}"
    width = block_e(head_dim)
    return f"tensordesc<{dtype}[{rows},{width}]>" if width == head_dim else f"tensordesc<{dtype}[{rows},1,{width}]>"


def _spec(
    part: str,
    kernel: JITFunction,
    tile: Tiling,
    *,
    head_dim: int,
    dtype: str = "bf16",
    mask: str = "causal",
) -> Spec:
    """`mask`: causal, window or full. The specialized form is the one for most sequences."""
    constexprs: dict[str, object] = dict(
        tile.constexprs(head_dim=head_dim, sequences=MOST_AT_ONCE - 1, causal=mask != "full", window=mask == "window")
    )
    if kernel is flash_attention_forward_kernel:
        constexprs["WARP_SPECIALIZE"] = tile.warp_specialize
    queries = _tile_type(dtype, tile.block_m, head_dim, tile.tma)
    keys = _tile_type(dtype, tile.block_n, head_dim, tile.tma)
    types = {"q": queries, "dout": queries, "k": keys, "v": keys, "scale": "fp32", "scale_log2": "fp32"}
    types |= dict.fromkeys(("out", "dq", "dk", "dv"), f"*{dtype}") | dict.fromkeys(("lse", "delta"), "*fp32")
    starts = ("q_starts_B1", "k_starts_B1")
    types |= dict.fromkeys(starts, "*i32")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constexprs}
    owned = tile.block_n if kernel is flash_attention_dkdv_kernel else tile.block_m
    expects = {"wgmma": owned >= 64, "tma": tile.tma, "setmaxnreg": tile.warp_specialize}
    return Spec(
        name=f"flash_attention {part} E{head_dim} {dtype} {mask} {tile}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        aligned=tuple(
            name
            for name, kind in signature.items()
            if (kind[0] == "*" and name not in starts) or name.endswith("_stride")
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        expects=frozenset(name for name, expected in expects.items() if expected),
    )


def _delta_spec(head_dim: int, dtype: str, *, of_lse: bool) -> Spec:
    pointers = {"out": f"*{dtype}", "dout": f"*{dtype}", "dlse": "*fp32", "delta": "*fp32"}
    strides = dict.fromkeys(("out_row_stride", "dout_row_stride", "dout_head_stride"), "i32")
    return Spec(
        name=f"flash_attention delta E{head_dim} {dtype}{' dlse' if of_lse else ''}",
        kernel=flash_attention_delta_kernel,
        signature=pointers | strides | {"query_rows": "i32"},
        constexprs={"HEAD_DIM": head_dim, "BLOCK_E": block_e(head_dim), "BLOCK_M": DELTA_ROWS, "HAS_DLSE": of_lse},
        aligned=(*pointers, *strides),
        num_warps=DELTA_WARPS,
        num_stages=3,
        expects=frozenset(),
    )


def _masked(part: str, kernel: JITFunction, tile: Tiling, head_dim: int) -> list[Spec]:
    """Whatever a model may ask of a tiling that serves its head size."""
    return [
        _spec(part, kernel, tile, head_dim=head_dim, dtype=dtype, mask=mask)
        for dtype in ("bf16", "fp16")
        for mask in ("causal", "full", "window")
    ]


def _specs() -> list[Spec]:
    parts = (
        ("forward", flash_attention_forward_kernel, FORWARD),
        ("dkdv", flash_attention_dkdv_kernel, BACKWARD_KV),
        ("dq", flash_attention_dq_kernel, BACKWARD_Q),
    )
    specs = []
    for part, kernel, table in parts:
        for head_dim, (shipped, *others) in table.items():
            specs += [_spec(part, kernel, tile, head_dim=head_dim) for tile in others]
            specs += _masked(part, kernel, shipped, head_dim)
        for head_dim in (48, 128, 192, 256):
            specs += _masked(part, kernel, _portable(table, head_dim), head_dim)
    for head_dim, dtype, of_lse in product((48, 64, 80, 128, 192, 256), ("bf16", "fp16"), (False, True)):
        specs.append(_delta_spec(head_dim, dtype, of_lse=of_lse))
    return specs


SPECS = _specs()
