"""Write this step's keys and values into their slots of the paged cache.

Knows nothing of sequences: a slot is `block * P + offset`, chosen by the caller. Slots of one call are distinct.

Caches of int8 hold each token's head in steps of its own: value * scale, where the scale, float32, is a 127th of the
largest magnitude of the head and lies at the same slot of `k_scales_NPK` or `v_scales_NPK`.
"""

import numpy as np
import torch
from torch import Tensor

from rayllm_kernels.dispatch import loops_without_gradient_may_run, on_triton
from rayllm_kernels.native import Kernel, integer, next_task
from rayllm_kernels.simd import (
    LANES,
    broadcast,
    div,
    load,
    load_bf16,
    load_i64,
    max_abs,
    max_abs_lanes,
    rint,
    store,
    store_bf16,
    store_f32,
    store_i8,
)


def quantize_heads(x_TKE: Tensor) -> tuple[Tensor, Tensor]:
    """-> int8 values, ties rounded to even, and the scales [T, K]. A head of zeros has the scale 0."""
    x_TKE = x_TKE.float()
    scales_TK = x_TKE.abs().amax(-1) / 127
    steps_TK = torch.where(scales_TK > 0, scales_TK, 1.0)
    return (x_TKE / steps_TK[..., None]).round().to(torch.int8), scales_TK


def store_kv_reference(
    k_TKE: Tensor,
    v_TKE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    slot_mapping_T: Tensor,
    k_scales_NPK: Tensor | None = None,
    v_scales_NPK: Tensor | None = None,
) -> None:
    """The contract of `store_kv` in plain torch, on any device."""
    slots = slot_mapping_T.long()
    for x, cache, scales in ((k_TKE, k_cache_NPKE, k_scales_NPK), (v_TKE, v_cache_NPKE, v_scales_NPK)):
        if scales is None:
            cache.flatten(0, 1)[slots] = x.to(cache.dtype)
        else:
            cache.flatten(0, 1)[slots], scales.flatten(0, 1)[slots] = quantize_heads(x)


def _store_tokens(block: int) -> None:
    """Kernel: task = (cache, token)."""
    sources = integer(block, 0), integer(block, 1)
    caches = integer(block, 2), integer(block, 3)
    pitches = integer(block, 4), integer(block, 5)  # elements from one token to the next
    slots, size, is_bf16, cache_is_bf16 = integer(block, 6), integer(block, 7), integer(block, 8), integer(block, 9)
    item, cache_item = 2 if is_bf16 else 4, 2 if cache_is_bf16 else 4
    task = next_task(block)
    while task >= 0:
        which, token = task % 2, task // 2
        target = caches[which] + cache_item * load_i64(slots + 8 * token) * size
        source = sources[which] + item * token * pitches[which]
        for i in range(0, size, LANES):
            values = load_bf16(source + 2 * i) if is_bf16 else load(source + 4 * i)
            if cache_is_bf16:
                store_bf16(target + 2 * i, values)
            else:
                store(target + 4 * i, values)
        task = next_task(block)


_store_tokens_kernel = Kernel(_store_tokens, integers=10, parallel_from=16)


def _quantize_tokens(block: int) -> None:
    """Kernel: task = (cache, token), head by head: the largest magnitude, then the steps."""
    sources = integer(block, 0), integer(block, 1)
    caches = integer(block, 2), integer(block, 3)
    scales = integer(block, 4), integer(block, 5)
    pitches = integer(block, 6), integer(block, 7)  # elements from one token to the next
    slots, kv_heads, head_dim, is_bf16 = integer(block, 8), integer(block, 9), integer(block, 10), integer(block, 11)
    item = 2 if is_bf16 else 4
    task = next_task(block)
    while task >= 0:
        which, token = task % 2, task // 2
        source = sources[which] + item * token * pitches[which]
        first = load_i64(slots + 8 * token) * kv_heads
        for head in range(first, first + kv_heads):
            largest = broadcast(np.float32(0.0))
            for i in range(0, head_dim, LANES):
                largest = max_abs(largest, load_bf16(source + 2 * i) if is_bf16 else load(source + 4 * i))
            scale = np.float32(max_abs_lanes(largest) / np.float32(127.0))
            store_f32(scales[which] + 4 * head, scale)
            step = broadcast(scale if scale > 0 else np.float32(1.0))
            for i in range(0, head_dim, LANES):
                values = load_bf16(source + 2 * i) if is_bf16 else load(source + 4 * i)
                store_i8(caches[which] + head * head_dim + i, rint(div(values, step)))
            source += item * head_dim
        task = next_task(block)


_quantize_tokens_kernel = Kernel(_quantize_tokens, integers=12, parallel_from=16)


def store_kv(
    k_TKE: Tensor,
    v_TKE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    slot_mapping_T: Tensor,
    k_scales_NPK: Tensor | None = None,
    v_scales_NPK: Tensor | None = None,
) -> None:
    """Store row t of `k_TKE` and `v_TKE` at slot `slot_mapping_T[t]`, converted to the caches' dtype.

    The scales are given where that is int8, and only there.
    """
    if on_triton("store_kv", k_TKE) and not torch.is_grad_enabled():
        from rayllm_kernels.gpu import store_kv as gpu

        if gpu.supports(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T):
            gpu.store_kv(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T, k_scales_NPK, v_scales_NPK)
            return
    if not takes_pages(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T):
        store_kv_reference(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T, k_scales_NPK, v_scales_NPK)
        return
    if k_scales_NPK is not None and v_scales_NPK is not None:
        _quantize_tokens_kernel(
            2 * k_TKE.shape[0],
            k_TKE.data_ptr(),
            v_TKE.data_ptr(),
            k_cache_NPKE.data_ptr(),
            v_cache_NPKE.data_ptr(),
            k_scales_NPK.data_ptr(),
            v_scales_NPK.data_ptr(),
            k_TKE.stride(0),
            v_TKE.stride(0),
            slot_mapping_T.data_ptr(),
            k_TKE.shape[1],
            k_TKE.shape[2],
            k_TKE.dtype == torch.bfloat16,
        )
        return
    _store_tokens_kernel(
        2 * k_TKE.shape[0],
        k_TKE.data_ptr(),
        v_TKE.data_ptr(),
        k_cache_NPKE.data_ptr(),
        v_cache_NPKE.data_ptr(),
        k_TKE.stride(0),
        v_TKE.stride(0),
        slot_mapping_T.data_ptr(),
        k_TKE.shape[1] * k_TKE.shape[2],
        k_TKE.dtype == torch.bfloat16,
        k_cache_NPKE.dtype == torch.bfloat16,
    )


def takes_pages(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> bool:
    """Whether the compiled kernel takes these tensors: caches on CPU, heads of a token side by side."""
    return (
        loops_without_gradient_may_run(k)
        and (k.dtype == torch.bfloat16 or k.dtype == torch.float32)
        and k.dtype == v.dtype
        and (
            k_cache.dtype == torch.bfloat16
            or k_cache.dtype == torch.float32
            or (k_cache.dtype == torch.int8 and k.shape[2] % LANES == 0)
        )
        and k_cache.dtype == v_cache.dtype
        and slots.dtype == torch.int64
        and (k.shape[1] * k.shape[2]) % LANES == 0
        and k.stride()[1:] == v.stride()[1:] == (k.shape[2], 1)
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and slots.is_contiguous()
    )
