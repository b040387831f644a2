"""Launching flash attention, and its registration with torch: `torch.ops.rayllm.flash_attention` and its backward.

Nothing is read back from the device, so a call can be captured in a CUDA graph. cu_seqlens must be int32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rayllm_kernels.gpu.attention_tiles import tile_count
from rayllm_kernels.gpu.flash_attention_backward import (
    flash_attention_delta_kernel,
    flash_attention_dkdv_kernel,
    flash_attention_dq_kernel,
)
from rayllm_kernels.gpu.flash_attention_forward import flash_attention_forward_kernel

LOG2E = 1.4426950408889634
DELTA_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a kernel cuts its work: `block_m` queries by `block_n` keys. `tma`: K and V (and Q) through descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool
    warp_specialize: bool = False


def _tma(block_m: int, block_n: int, num_warps: int, num_stages: int, *, warp_specialize: bool = False) -> Tiling:
    return Tiling(
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        tma=True,
        warp_specialize=warp_specialize,
    )


# By padded head size, for sm_90. The first of each is used; the others are candidates: which is fastest has not been
# measured yet, on any GPU.
FORWARD: dict[int, tuple[Tiling, ...]] = {
    64: (_tma(128, 128, 8, 2), _tma(128, 64, 4, 3), _tma(64, 128, 4, 2, warp_specialize=True)),
    128: (_tma(128, 128, 8, 2), _tma(128, 64, 8, 3), _tma(64, 128, 4, 2, warp_specialize=True)),
    256: (_tma(128, 64, 8, 2), _tma(64, 64, 4, 2)),
}
BACKWARD_KV: dict[int, tuple[Tiling, ...]] = {
    64: (_tma(32, 128, 8, 2),),
    128: (_tma(32, 128, 8, 2),),
    256: (_tma(32, 64, 8, 1),),
}
BACKWARD_Q: dict[int, tuple[Tiling, ...]] = {
    64: (_tma(128, 64, 8, 2),),
    128: (_tma(128, 64, 8, 2),),
    256: (_tma(64, 64, 8, 1),),
}
# Devices other than sm_90: pointers, and no more than 99 KB of shared memory up to head size 128.
PORTABLE = Tiling(block_m=64, block_n=32, num_warps=4, num_stages=2, tma=False)


def block_e(head_dim: int) -> int:
    """Columns of a tile: Triton's are powers of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiling(table: dict[int, tuple[Tiling, ...]], x: Tensor) -> Tiling:
    """What serves x's device and head size. On CPU the interpreter runs, for which the portable tiles suit."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0):
        return table[max(64, block_e(x.shape[2]))][0]
    return PORTABLE


def _readable(x_THE: Tensor, tma: bool) -> Tensor:
    """x, or a copy where the kernel cannot read it: rows need not lie dense, but the head size has to, and the TMA unit
    wants multiples of 16 bytes and heads one behind another."""
    fits = x_THE.stride(2) == 1
    if tma:
        fits = fits and x_THE.stride(1) == x_THE.shape[2]
        fits = fits and x_THE.data_ptr() % 16 == 0 and x_THE.stride(0) * x_THE.element_size() % 16 == 0
    return x_THE if fits else x_THE.contiguous()


def describe(x_THE: Tensor, rows: int, tma: bool) -> Any:
    """What a kernel takes x as: x itself, or its descriptor in tiles of `rows`. A head size that is no power of two
    needs three dimensions, so that the columns past it read as zeros and not as the next head."""
    if not tma:
        return x_THE
    tokens, heads, head_dim = x_THE.shape
    width = block_e(head_dim)
    if width == head_dim:
        return TensorDescriptor(x_THE, [tokens, heads * head_dim], [x_THE.stride(0), 1], [rows, width])
    return TensorDescriptor(x_THE, [tokens, heads, head_dim], [x_THE.stride(0), head_dim, 1], [rows, 1, width])


def _shared(q: Tensor, k: Tensor, sequences: int, causal: bool, window: int | None, tile: Tiling) -> dict[str, Any]:
    """The compile-time arguments that all kernels but delta have."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[2],
        "BLOCK_E": block_e(q.shape[2]),
        "BLOCK_B": triton.next_power_of_2(sequences + 1),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "TMA": tile.tma,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    tile: Tiling,
) -> tuple[Tensor, Tensor]:
    """-> (out_THE, lse_HT)."""
    (rows, heads, head_dim), sequences = q.shape, q_starts.shape[0] - 1
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    if rows == 0 or k.shape[0] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = (_readable(x, tile.tma) for x in (q, k, v))
    flash_attention_forward_kernel[(tile_count(rows, sequences, tile.block_m), heads)](
        describe(q, tile.block_m, tile.tma),
        describe(k, tile.block_n, tile.tma),
        describe(v, tile.block_n, tile.tma),
        out,
        lse,
        q_starts,
        k_starts,
        sequences,
        rows,
        window or 0,
        scale * LOG2E,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        out.stride(0),
        WARP_SPECIALIZE=tile.warp_specialize,
        **_shared(q, k, sequences, causal, window, tile),
    )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    kv_tile: Tiling,
    q_tile: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (dq, dk, dv), each written by one program in a fixed order: the same bits in every run."""
    (rows, heads, head_dim), sequences = q.shape, q_starts.shape[0] - 1
    kv_shape = k.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if rows == 0 or kv_shape[0] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    tma = kv_tile.tma or q_tile.tma
    q, k, v, dout = (_readable(x, tma) for x in (q, k, v, dout))
    delta = torch.empty_like(lse)
    flash_attention_delta_kernel[(triton.cdiv(rows, DELTA_ROWS), heads)](
        out,
        dout,
        lse if dlse is None else dlse.contiguous(),
        delta,
        rows,
        out.stride(0),
        *dout.stride()[:2],
        HEAD_DIM=head_dim,
        BLOCK_E=block_e(head_dim),
        BLOCK_M=DELTA_ROWS,
        HAS_DLSE=dlse is not None,
        num_warps=4,
    )
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    flash_attention_dkdv_kernel[(tile_count(kv_shape[0], sequences, kv_tile.block_n), kv_shape[1])](
        describe(q, kv_tile.block_m, kv_tile.tma),
        describe(k, kv_tile.block_n, kv_tile.tma),
        describe(v, kv_tile.block_n, kv_tile.tma),
        describe(dout, kv_tile.block_m, kv_tile.tma),
        lse,
        delta,
        dk,
        dv,
        q_starts,
        k_starts,
        sequences,
        rows,
        kv_shape[0],
        window or 0,
        scale,
        *strides,
        dk.stride(0),
        **_shared(q, k, sequences, causal, window, kv_tile),
    )
    flash_attention_dq_kernel[(tile_count(rows, sequences, q_tile.block_m), heads)](
        describe(q, q_tile.block_m, q_tile.tma),
        describe(k, q_tile.block_n, q_tile.tma),
        describe(v, q_tile.block_n, q_tile.tma),
        describe(dout, q_tile.block_m, q_tile.tma),
        lse,
        delta,
        dq,
        q_starts,
        k_starts,
        sequences,
        rows,
        window or 0,
        scale,
        *strides,
        dq.stride(0),
        **_shared(q, k, sequences, causal, window, q_tile),
    )
    return dq, dk, dv


@torch.library.custom_op("rayllm::flash_attention", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """`flash_attention_with_lse` as torch's operator."""
    return forward(q, k, v, q_starts, k_starts, scale, causal, window, tiling(FORWARD, q))


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("rayllm::flash_attention_backward", mutates_args=())
def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = tiling(BACKWARD_KV, q), tiling(BACKWARD_Q, q)
    return backward(dout, dlse, q, k, v, out, lse, q_starts, k_starts, scale, causal, window, *tiles)


@attend_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.arguments = inputs[5:]


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, q_starts, k_starts, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = attend_backward(dout, dlse, q, k, v, out, lse, q_starts, k_starts, *ctx.arguments)
    return (*gradients, None, None, None, None, None)


attend.register_autograd(_differentiate, setup_context=_save)
