"""`store_kv` in Triton: this step's keys and values into their slots, converted, or as int8 with a scale per head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.spec import Spec

_NUM_WARPS = 4


@triton.jit
def _store_token(
    source: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    slot: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INT8: tl.constexpr,
) -> None:
    """All heads of one token."""
    head = tl.arange(0, BLOCK_K)
    element = head[:, None] * HEAD_DIM + tl.arange(0, BLOCK_E)[None, :]
    inside = (head < KV_HEADS)[:, None] & (tl.arange(0, BLOCK_E) < HEAD_DIM)[None, :]
    x_KE = tl.load(source + element, inside, 0)
    if INT8:
        x_KE = x_KE.to(tl.float32)
        scale_K = tl.div_rn(tl.max(tl.abs(x_KE), 1), 127.0)
        x_KE = tl.div_rn(x_KE, tl.where(scale_K > 0, scale_K, 1.0)[:, None])
        x_KE = (x_KE + 12582912.0) - 12582912.0  # 1.5 * 2**23, past which float32 has no fractions: round, ties to even
        tl.store(scales + slot * KV_HEADS + head, scale_K, head < KV_HEADS)
    tl.store(cache + slot * (KV_HEADS * HEAD_DIM) + element, x_KE.to(cache.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["slots"])
def store_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    slots: tl.tensor,
    k_token_stride: tl.tensor,
    v_token_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INT8: tl.constexpr,
) -> None:
    """Program = token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    _store_token(k + token * k_token_stride, k_cache, k_scales, slot, KV_HEADS, HEAD_DIM, BLOCK_K, BLOCK_E, INT8)
    _store_token(v + token * v_token_stride, v_cache, v_scales, slot, KV_HEADS, HEAD_DIM, BLOCK_K, BLOCK_E, INT8)


def _constexprs(kv_heads: int, head_dim: int, *, int8: bool) -> dict[str, object]:
    return {
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_K": triton.next_power_of_2(kv_heads),
        "BLOCK_E": triton.next_power_of_2(head_dim),
        "INT8": int8,
    }


@torch.library.custom_op(
    "rayllm::store_kv", mutates_args=("k_cache_NPKE", "v_cache_NPKE", "k_scales_NPK", "v_scales_NPK")
)
def store_kv(
    k_TKE: Tensor,
    v_TKE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    slot_mapping_T: Tensor,
    k_scales_NPK: Tensor | None,
    v_scales_NPK: Tensor | None,
) -> None:
    """For tensors that `supports` takes; the scales are given where the caches are int8, and contiguous."""
    if k_TKE.shape[0] == 0:
        return
    launch_kernel(
        store_kernel,
        (k_TKE.shape[0],),
        k_TKE,
        v_TKE,
        k_cache_NPKE,
        v_cache_NPKE,
        k_scales_NPK,
        v_scales_NPK,
        slot_mapping_T,
        k_TKE.stride(0),
        v_TKE.stride(0),
        **_constexprs(k_TKE.shape[1], k_TKE.shape[2], int8=k_cache_NPKE.dtype == torch.int8),
        num_warps=_NUM_WARPS,
    )


@store_kv.register_fake
def _(*_arguments: object, **_keywords: object) -> None:
    """Nothing is returned, and what changes keeps its shape."""


def supports(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> bool:
    """Heads of a token side by side, caches contiguous."""
    return (
        k.is_floating_point()
        and k_cache.dtype == v_cache.dtype
        and k_cache.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8)
        and k.stride()[1:] == v.stride()[1:] == (k.shape[2], 1)
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and slots.is_contiguous()
    )


def _spec(kv_heads: int, head_dim: int, *, dtype: str, cache: str) -> Spec:
    int8 = cache == "i8"
    caches, scales = f"*{cache}", "*fp32" if int8 else "constexpr"
    pointers = dict.fromkeys(("k", "v"), f"*{dtype}") | dict.fromkeys(("k_cache", "v_cache"), caches)
    pointers |= dict.fromkeys(("k_scales", "v_scales"), scales)
    strides = dict.fromkeys(("k_token_stride", "v_token_stride"), "i32")
    constexprs = _constexprs(kv_heads, head_dim, int8=int8) | ({} if int8 else {"k_scales": None, "v_scales": None})
    return Spec(
        name=f"store_kv {kv_heads} x E{head_dim} {dtype} to {cache}",
        kernel=store_kernel,
        signature=pointers | {"slots": "*i64"} | strides | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*(name for name in pointers if name not in constexprs), *strides),
        num_warps=_NUM_WARPS,
        num_stages=3,  # what a launch that names none gets
        expects=frozenset(),
    )


SPECS = [
    _spec(kv_heads, head_dim, dtype=dtype, cache=cache)
    for kv_heads, head_dim in ((3, 64), (8, 128), (40, 128), (16, 256), (32, 80))
    for dtype in ("bf16", "fp16", "fp32")
    for cache in ("bf16", "fp16", "fp32", "i8")
]
