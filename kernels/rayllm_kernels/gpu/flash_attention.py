"""Launching flash attention, and its registration with torch: `torch.ops.rayllm.flash_attention` and its backward.

Nothing is read back from the device, so a call can be captured in a CUDA graph. `q_starts` and `k_starts` are the
contract's cu_seqlens. Gradients are the same bits in every run: each has one writer, which adds in a fixed order.
"""

from typing import Any, NamedTuple

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
from rayllm_kernels.gpu.flash_attention_configs import (
    BACKWARD_KV,
    BACKWARD_Q,
    DELTA_ROWS,
    DELTA_WARPS,
    FORWARD,
    Tiling,
    block_e,
    tiling,
)
from rayllm_kernels.gpu.flash_attention_forward import flash_attention_forward_kernel
from rayllm_kernels.gpu.launch import launch_kernel

LOG2E = 1.4426950408889634


class Pattern(NamedTuple):
    """Which queries attend to which keys, and how strongly."""

    q_starts: Tensor
    k_starts: Tensor
    scale: float
    causal: bool
    window: int | None

    @property
    def sequences(self) -> int:
        return self.q_starts.shape[0] - 1

    def options(self, head_dim: int, tile: Tiling) -> dict[str, Any]:
        """What all kernels but delta are compiled for, and how."""
        constexprs = tile.constexprs(
            head_dim=head_dim,
            sequences=self.sequences,
            causal=self.causal,
            window=self.window is not None,
        )
        return constexprs | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _readable(x_THE: Tensor, tma: bool) -> Tensor:
    """x, or a copy where the kernel cannot read it: rows need not lie dense, but the head size has to, and the TMA unit
    wants multiples of 16 bytes, heads one behind another, and rows that do not overlap, as those of one that is
    expanded do. (`contiguous` would keep what is dense but lies off 16 bytes, and the strides of a single row.)"""
    _, heads, head_dim = x_THE.shape
    fits = x_THE.stride(2) == 1
    if tma:
        fits = fits and x_THE.stride(1) == head_dim and x_THE.stride(0) >= heads * head_dim
        fits = fits and x_THE.data_ptr() % 16 == 0 and x_THE.stride(0) * x_THE.element_size() % 16 == 0
    return x_THE if fits else x_THE.clone(memory_format=torch.contiguous_format)


def _describe(x_THE: Tensor, rows: int, tma: bool) -> Any:
    """What a kernel takes x as: x itself, or its descriptor in tiles of `rows`. A head size that is no power of two
    needs three dimensions, so that the columns past it read as zeros and not as the next head."""
    if not tma:
        return x_THE
    tokens, heads, head_dim = x_THE.shape
    width = block_e(head_dim)
    if width == head_dim:
        return TensorDescriptor(x_THE, [tokens, heads * head_dim], [x_THE.stride(0), 1], [rows, width])
    return TensorDescriptor(x_THE, [tokens, heads, head_dim], [x_THE.stride(0), head_dim, 1], [rows, 1, width])


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, tile: Tiling) -> tuple[Tensor, Tensor]:
    """-> (out_THE, lse_HT)."""
    rows, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    if rows == 0 or k.shape[0] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = (_readable(x, tile.tma) for x in (q, k, v))
    launch_kernel(
        flash_attention_forward_kernel,
        (tile_count(rows, pattern.sequences, tile.block_m), heads),
        _describe(q, tile.block_m, tile.tma),
        _describe(k, tile.block_n, tile.tma),
        _describe(v, tile.block_n, tile.tma),
        out,
        lse,
        pattern.q_starts,
        pattern.k_starts,
        pattern.sequences,
        rows,
        pattern.window or 0,
        heads // k.shape[1],
        pattern.scale * LOG2E,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        out.stride(0),
        WARP_SPECIALIZE=tile.warp_specialize,
        **pattern.options(head_dim, tile),
    )
    return out, lse


def _delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """[H, T] float32: what every score's gradient is less by."""
    rows, heads, head_dim = out.shape
    delta = torch.empty_like(lse)
    launch_kernel(
        flash_attention_delta_kernel,
        (triton.cdiv(rows, DELTA_ROWS), heads),
        out,
        dout,
        lse if dlse is None else dlse.contiguous(),  # lse: not read, but a pointer has to be given
        delta,
        rows,
        out.stride(0),
        *dout.stride()[:2],
        HEAD_DIM=head_dim,
        BLOCK_E=block_e(head_dim),
        BLOCK_M=DELTA_ROWS,
        HAS_DLSE=dlse is not None,
        num_warps=DELTA_WARPS,
    )
    return delta


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: Pattern,
    kv_tile: Tiling,
    q_tile: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (dq, dk, dv). `out` and `lse` are what `forward` gave."""
    (rows, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if rows == 0 or keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, dout = (_readable(x, kv_tile.tma or q_tile.tma) for x in (q, k, v, dout))
    delta = _delta(out, dout, lse, dlse)
    numbers = (pattern.window or 0, heads // kv_heads, pattern.scale)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])

    def inputs(tile: Tiling) -> tuple[Any, ...]:
        return (
            _describe(q, tile.block_m, tile.tma),
            _describe(k, tile.block_n, tile.tma),
            _describe(v, tile.block_n, tile.tma),
            _describe(dout, tile.block_m, tile.tma),
            lse,
            delta,
        )

    starts = (pattern.q_starts, pattern.k_starts, pattern.sequences, rows)
    launch_kernel(
        flash_attention_dkdv_kernel,
        (tile_count(keys, pattern.sequences, kv_tile.block_n), kv_heads),
        *inputs(kv_tile),
        dk,
        dv,
        *starts,
        keys,
        *numbers,
        *strides,
        dk.stride(0),
        **pattern.options(head_dim, kv_tile),
    )
    launch_kernel(
        flash_attention_dq_kernel,
        (tile_count(rows, pattern.sequences, q_tile.block_m), heads),
        *inputs(q_tile),
        dq,
        *starts,
        *numbers,
        *strides,
        dq.stride(0),
        **pattern.options(head_dim, q_tile),
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
    return forward(q, k, v, Pattern(q_starts, k_starts, scale, causal, window), tiling(FORWARD, q))


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
    pattern = Pattern(q_starts, k_starts, scale, causal, window)
    return backward(dout, dlse, q, k, v, out, lse, pattern, tiling(BACKWARD_KV, q), tiling(BACKWARD_Q, q))


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
