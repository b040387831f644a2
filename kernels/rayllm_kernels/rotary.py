"""Rotary position embedding of queries and keys, in the half-rotation layout of Hugging Face checkpoints.

Numerically transformers' `apply_rotary_pos_emb`: below float32 both products are rounded before they are added.
Computes no angles.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayllm_kernels.dispatch import loops_may_run, on_triton, readable
from rayllm_kernels.native import Kernel, empty, integer, next_task
from rayllm_kernels.simd import LANES, add, inlined, load, load_bf16, mul, round_bf16, store, store_bf16, sub


def apply_rotary_reference(q_THE: Tensor, k_TKE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `apply_rotary` in plain torch, on any device and under autograd."""
    half = q_THE.shape[-1] // 2
    cos, sin = cos_TE[:, None, half:], sin_TE[:, None, half:]

    def rotate(x: Tensor) -> Tensor:
        low, high = x[..., :half], x[..., half:]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    return rotate(q_THE), rotate(k_TKE)


@inlined
def rotate_head(source: int, target: int, cos: int, sin: int, half: int, is_bf16: int) -> None:
    """One head, for use in kernels: `half` bytes of low dimensions, then of high ones. May be in place."""
    for i in range(0, half, (2 if is_bf16 else 4) * LANES):
        if is_bf16:
            low, high = load_bf16(source + i), load_bf16(source + half + i)
            c, s = load_bf16(cos + i), load_bf16(sin + i)
            store_bf16(target + i, sub(round_bf16(mul(low, c)), round_bf16(mul(high, s))))
            store_bf16(target + half + i, add(round_bf16(mul(high, c)), round_bf16(mul(low, s))))
        else:
            low, high = load(source + i), load(source + half + i)
            c, s = load(cos + i), load(sin + i)
            store(target + i, sub(mul(low, c), mul(high, s)))
            store(target + half + i, add(mul(high, c), mul(low, s)))


def _rotate_heads(block: int) -> None:
    """Kernel: task = token, all its query and key heads."""
    sources = integer(block, 0), integer(block, 1)
    targets = integer(block, 2), integer(block, 3)
    counts = integer(block, 4), integer(block, 5)
    pitches = integer(block, 6), integer(block, 7)  # elements from one token to the next
    cos, sin, head_dim, is_bf16 = integer(block, 8), integer(block, 9), integer(block, 10), integer(block, 11)
    item = 2 if is_bf16 else 4
    half = head_dim // 2 * item
    task = next_task(block)
    while task >= 0:
        angles = task * head_dim * item + half
        for which in range(2):
            for head in range(counts[which]):
                source = sources[which] + (task * pitches[which] + head * head_dim) * item
                target = targets[which] + (task * counts[which] + head) * head_dim * item
                rotate_head(source, target, cos + angles, sin + angles, half, is_bf16)
        task = next_task(block)


_rotate_heads_kernel = Kernel(_rotate_heads, integers=12, parallel_from=8)


def apply_rotary(q_THE: Tensor, k_TKE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor]:
    """-> rotated q and k, contiguous. `cos_TE` and `sin_TE` repeat the angles in both halves; the second is read."""
    if on_triton("apply_rotary", q_THE):
        from rayllm_kernels.gpu import rotary as gpu

        if gpu.supports(q_THE, k_TKE, cos_TE, sin_TE):
            rotated: tuple[Tensor, Tensor] = gpu.rotary(q_THE, k_TKE, cos_TE, sin_TE, False)
            return rotated
    if not (takes_heads(q_THE, cos_TE, sin_TE) and takes_heads(k_TKE, cos_TE, sin_TE)):
        return apply_rotary_reference(q_THE, k_TKE, cos_TE, sin_TE)
    if not torch.is_grad_enabled():
        return _run(q_THE, k_TKE, cos_TE, sin_TE)
    q_out, k_out = _ApplyRotary.apply(q_THE, k_TKE, cos_TE, sin_TE)  # type: ignore[no-untyped-call]
    return q_out, k_out


def _run(q_THE: Tensor, k_TKE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor]:
    q_out = empty(q_THE.shape, q_THE)
    k_out = empty(k_TKE.shape, k_TKE)
    _rotate_heads_kernel(
        q_THE.shape[0],
        q_THE.data_ptr(),
        k_TKE.data_ptr(),
        q_out.data_ptr(),
        k_out.data_ptr(),
        q_THE.shape[1],
        k_TKE.shape[1],
        q_THE.stride(0),
        k_TKE.stride(0),
        cos_TE.data_ptr(),
        sin_TE.data_ptr(),
        q_THE.shape[2],
        q_THE.dtype == torch.bfloat16,
    )
    return q_out, k_out


class _ApplyRotary(torch.autograd.Function):
    """The gradient is turned back by the same angles; angles have none."""

    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, k_TKE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_TE, sin_TE)
        return _run(q_THE, k_TKE, cos_TE, sin_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_THE: Tensor, dk_TKE: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos_TE, sin_TE = ctx.saved_tensors
        return *_run(readable(dq_THE), readable(dk_TKE), cos_TE, -sin_TE), None, None


def takes_heads(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the compiled kernel takes these tensors: heads of a token side by side."""
    return (
        loops_may_run(x)
        and (x.dtype == torch.bfloat16 or x.dtype == torch.float32)
        and x.dtype == cos.dtype == sin.dtype
        and x.shape[2] % (2 * LANES) == 0
        and x.stride()[1:] == (x.shape[2], 1)
        and cos.is_contiguous()
        and sin.is_contiguous()
    )
