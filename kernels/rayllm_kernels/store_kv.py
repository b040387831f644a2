"""Write this step's keys and values into their slots of the paged cache.

Knows nothing of sequences: a slot is `block * P + offset`, chosen by the caller. Slots of one call are distinct.
"""

from torch import Tensor


def store_kv_reference(
    k_TKE: Tensor, v_TKE: Tensor, k_cache_NPKE: Tensor, v_cache_NPKE: Tensor, slot_mapping_T: Tensor
) -> None:
    """The contract of `store_kv` in plain torch, on any device."""
    slots = slot_mapping_T.long()
    k_cache_NPKE.flatten(0, 1)[slots] = k_TKE.to(k_cache_NPKE.dtype)
    v_cache_NPKE.flatten(0, 1)[slots] = v_TKE.to(v_cache_NPKE.dtype)


def store_kv(k_TKE: Tensor, v_TKE: Tensor, k_cache_NPKE: Tensor, v_cache_NPKE: Tensor, slot_mapping_T: Tensor) -> None:
    """Store row t of `k_TKE` and `v_TKE` at slot `slot_mapping_T[t]`, converted to the caches' dtype."""
    store_kv_reference(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_mapping_T)
