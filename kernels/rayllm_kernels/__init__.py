"""Kernels of the hot loops: one op per file, each with a plain torch reference beside it.

Knows nothing of requests, schedulers or processes; every function takes tensors and numbers.
"""

from rayllm_kernels.paged_attention import paged_attention, paged_attention_reference
from rayllm_kernels.store_kv import store_kv, store_kv_reference

__all__ = ["paged_attention", "paged_attention_reference", "store_kv", "store_kv_reference"]
