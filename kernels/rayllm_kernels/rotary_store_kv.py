"""Rotate queries and keys, and write the keys and values into their slots of the paged cache: one pass over a step.

What `apply_rotary` and `store_kv` do one after the other, whose contracts hold here; a decode step is short enough to
feel the second start of a kernel in every layer.
"""

import torch
from torch import Tensor

from rayllm_kernels.dispatch import on_triton
from rayllm_kernels.native import Kernel, empty, integer, next_task
from rayllm_kernels.rotary import apply_rotary, rotate_head, takes_heads
from rayllm_kernels.simd import LANES, load, load_i64, store
from rayllm_kernels.store_kv import store_kv, takes_pages


def rotary_store_kv_reference(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    slot_mapping_T: Tensor,
    k_scales_NPK: Tensor | None = None,
    v_scales_NPK: Tensor | None = None,
) -> Tensor:
    """The contract of `rotary_store_kv` by the two ops that it joins, on any device."""
    q_THE, k_TKE = apply_rotary(q_THE, k_TKE, cos_TE, sin_TE)
    store_kv(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T, k_scales_NPK, v_scales_NPK)
    return q_THE


def _rotate_and_store(block: int) -> None:
    """Kernel: task = token. Caches hold what q, k and v hold, so that a value is copied as it is."""
    q, k, v, q_out = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    k_cache, v_cache, slots = integer(block, 4), integer(block, 5), integer(block, 6)
    q_pitch, k_pitch, v_pitch = integer(block, 7), integer(block, 8), integer(block, 9)  # bytes from token to token
    cos, sin, head, is_bf16 = integer(block, 10), integer(block, 11), integer(block, 12), integer(block, 13)  # bytes
    heads, kv_heads = integer(block, 14), integer(block, 15)
    task = next_task(block)
    while task >= 0:
        c, s = cos + task * head + head // 2, sin + task * head + head // 2
        slot = load_i64(slots + 8 * task) * kv_heads * head
        for i in range(heads):
            rotate_head(q + task * q_pitch + i * head, q_out + (task * heads + i) * head, c, s, head // 2, is_bf16)
        for i in range(kv_heads):
            rotate_head(k + task * k_pitch + i * head, k_cache + slot + i * head, c, s, head // 2, is_bf16)
        for i in range(0, kv_heads * head, 4 * LANES):  # bytes are bytes
            store(v_cache + slot + i, load(v + task * v_pitch + i))
        task = next_task(block)


_rotate_and_store_kernel = Kernel(_rotate_and_store, integers=16, parallel_from=8)


def rotary_store_kv(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    slot_mapping_T: Tensor,
    k_scales_NPK: Tensor | None = None,
    v_scales_NPK: Tensor | None = None,
) -> Tensor:
    """-> the rotated queries; the rotated keys, and the values, lie in their slots."""
    if on_triton("rotary_store_kv", q_THE) and not torch.is_grad_enabled():
        from rayllm_kernels.gpu import rotary_store_kv as gpu

        if gpu.supports(q_THE, k_TKE, v_TKE, cos_TE, sin_TE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T):
            rotated_THE: Tensor = gpu.rotary_store_kv(
                q_THE, k_TKE, v_TKE, cos_TE, sin_TE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T
            )
            return rotated_THE
    if not (
        takes_heads(q_THE, cos_TE, sin_TE)
        and takes_heads(k_TKE, cos_TE, sin_TE)
        and takes_pages(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T)
        and k_TKE.dtype == k_cache_NPKE.dtype
    ):
        target = (k_cache_NPKE, v_cache_NPKE, slot_mapping_T, k_scales_NPK, v_scales_NPK)
        return rotary_store_kv_reference(q_THE, k_TKE, v_TKE, cos_TE, sin_TE, *target)
    tokens, heads, head_dim = q_THE.shape
    item = q_THE.element_size()
    q_out = empty(q_THE.shape, q_THE)
    _rotate_and_store_kernel(
        tokens,
        q_THE.data_ptr(),
        k_TKE.data_ptr(),
        v_TKE.data_ptr(),
        q_out.data_ptr(),
        k_cache_NPKE.data_ptr(),
        v_cache_NPKE.data_ptr(),
        slot_mapping_T.data_ptr(),
        q_THE.stride(0) * item,
        k_TKE.stride(0) * item,
        v_TKE.stride(0) * item,
        cos_TE.data_ptr(),
        sin_TE.data_ptr(),
        head_dim * item,
        q_THE.dtype == torch.bfloat16,
        heads,
        k_TKE.shape[1],
    )
    return q_out
