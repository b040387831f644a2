"""Kernels of the hot loops: one op per file, each with a plain torch reference beside it.

Knows nothing of requests, schedulers or processes; every function takes tensors and numbers.
"""

from rayllm_kernels.flash_attention import (
    flash_attention,
    flash_attention_reference,
    flash_attention_with_lse,
)
from rayllm_kernels.fused_linear_cross_entropy import (
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_reference,
)
from rayllm_kernels.int8_linear import (
    quantize_rows,
    quantize_rows_reference,
    row_bounds,
    row_bounds_reference,
    w8a8_epilogue,
    w8a8_epilogue_reference,
    w8a8_linear,
    w8a8_linear_reference,
    w8a16_linear,
    w8a16_linear_reference,
)
from rayllm_kernels.int8_packed import pack_weight
from rayllm_kernels.linear import linear, linear_reference
from rayllm_kernels.native import compile_kernels
from rayllm_kernels.paged_attention import paged_attention, paged_attention_reference
from rayllm_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from rayllm_kernels.rms_norm_int8 import (
    add_rms_norm_int8,
    add_rms_norm_int8_reference,
    rms_norm_int8,
    rms_norm_int8_reference,
)
from rayllm_kernels.rotary import apply_rotary, apply_rotary_reference
from rayllm_kernels.rotary_store_kv import rotary_store_kv, rotary_store_kv_reference
from rayllm_kernels.silu_mul import silu_mul, silu_mul_reference
from rayllm_kernels.store_kv import store_kv, store_kv_reference

__all__ = [
    "add_rms_norm",
    "add_rms_norm_int8",
    "add_rms_norm_int8_reference",
    "add_rms_norm_reference",
    "apply_rotary",
    "apply_rotary_reference",
    "compile_kernels",
    "flash_attention",
    "flash_attention_reference",
    "flash_attention_with_lse",
    "fused_linear_cross_entropy",
    "fused_linear_cross_entropy_reference",
    "linear",
    "linear_reference",
    "pack_weight",
    "paged_attention",
    "paged_attention_reference",
    "quantize_rows",
    "quantize_rows_reference",
    "rms_norm",
    "rms_norm_int8",
    "rms_norm_int8_reference",
    "rms_norm_reference",
    "rotary_store_kv",
    "rotary_store_kv_reference",
    "row_bounds",
    "row_bounds_reference",
    "silu_mul",
    "silu_mul_reference",
    "store_kv",
    "store_kv_reference",
    "w8a8_epilogue",
    "w8a8_epilogue_reference",
    "w8a8_linear",
    "w8a8_linear_reference",
    "w8a16_linear",
    "w8a16_linear_reference",
]
