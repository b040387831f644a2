"""Write this step's keys and values into their slots of the paged cache.

Knows nothing of sequences: a slot is `block * P + offset`, chosen by the caller. Slots of one call are distinct.
"""

import torch
from torch import Tensor

from rayllm_kernels.native import Kernel, integer, next_task
from rayllm_kernels.simd import LANES, load, load_bf16, load_i64, store, store_bf16


def store_kv_reference(
    k_TKE: Tensor, v_TKE: Tensor, k_cache_NPKE: Tensor, v_cache_NPKE: Tensor, slot_mapping_T: Tensor
) -> None:
    """The contract of `store_kv` in plain torch, on any device."""
    slots = slot_mapping_T.long()
    k_cache_NPKE.flatten(0, 1)[slots] = k_TKE.to(k_cache_NPKE.dtype)
    v_cache_NPKE.flatten(0, 1)[slots] = v_TKE.to(v_cache_NPKE.dtype)


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


def store_kv(k_TKE: Tensor, v_TKE: Tensor, k_cache_NPKE: Tensor, v_cache_NPKE: Tensor, slot_mapping_T: Tensor) -> None:
    """Store row t of `k_TKE` and `v_TKE` at slot `slot_mapping_T[t]`, converted to the caches' dtype."""
    if not takes_pages(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T):
        store_kv_reference(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T)
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
        k.is_cpu
        and (k.dtype == torch.bfloat16 or k.dtype == torch.float32)
        and k.dtype == v.dtype
        and (k_cache.dtype == torch.bfloat16 or k_cache.dtype == torch.float32)
        and k_cache.dtype == v_cache.dtype
        and slots.dtype == torch.int64
        and (k.shape[1] * k.shape[2]) % LANES == 0
        and k.stride()[1:] == v.stride()[1:] == (k.shape[2], 1)
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and slots.is_contiguous()
        and not torch.is_grad_enabled()
    )
