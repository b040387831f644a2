"""`rotary_store_kv` in Triton: one launch for what a decode step does between the projections and attention."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.rotary import LAYOUTS, head_tiles, rotate_heads, warps
from rayllm_kernels.gpu.spec import Spec


@triton.jit(do_not_specialize=["slots"])
def rotary_store_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_out: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    q_pitch: tl.tensor,
    k_pitch: tl.tensor,
    v_pitch: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Program = token. Pitches: elements from one token to the next."""
    KV_SIZE: tl.constexpr = KV_HEADS * HEAD_DIM
    BLOCK_V: tl.constexpr = BLOCK_K * BLOCK_HALF * 2
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    c, s = cos + token * HEAD_DIM, sin + token * HEAD_DIM
    q_to, k_to = q_out + token * (HEADS * HEAD_DIM), k_cache + slot * KV_SIZE
    rotate_heads(q + token * q_pitch, q_to, c, s, HEADS, HEAD_DIM, BLOCK_H, BLOCK_HALF, False)
    rotate_heads(k + token * k_pitch, k_to, c, s, KV_HEADS, HEAD_DIM, BLOCK_K, BLOCK_HALF, False)
    element = tl.arange(0, BLOCK_V)
    value = tl.load(v + token * v_pitch + element, element < KV_SIZE, 0.0)
    tl.store(v_cache + slot * KV_SIZE + element, value.to(v_cache.dtype.element_ty), element < KV_SIZE)


@torch.library.custom_op("rayllm::rotary_store_kv", mutates_args=("k_cache", "v_cache"))
def rotary_store_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """For tensors that `supports` takes -> the rotated queries."""
    tokens, heads, head_dim = q.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens > 0:
        launch_kernel(
            rotary_store_kernel,
            (tokens,),
            q,
            k,
            v,
            q_out,
            k_cache,
            v_cache,
            cos,
            sin,
            slots,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            **head_tiles(heads, k.shape[1], head_dim),
            num_warps=warps(heads, head_dim),
        )
    return q_out


@rotary_store_kv.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    return q.new_empty(q.shape)


def supports(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> bool:
    """One floating dtype for all, as paged attention wants it of the caches; heads of a token side by side."""
    return (
        q.dtype == k.dtype == v.dtype == cos.dtype == sin.dtype == k_cache.dtype == v_cache.dtype
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q.shape[2] % 2 == 0
        and q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (q.shape[2], 1)
        and all(x.is_contiguous() for x in (cos, sin, k_cache, v_cache, slots))
    )


def _spec(heads: int, kv_heads: int, head_dim: int, *, dtype: str) -> Spec:
    pointers = dict.fromkeys(("q", "k", "v", "q_out", "k_cache", "v_cache", "cos", "sin"), f"*{dtype}")
    pitches = dict.fromkeys(("q_pitch", "k_pitch", "v_pitch"), "i32")
    constexprs: dict[str, object] = {**head_tiles(heads, kv_heads, head_dim)}
    return Spec(
        name=f"rotary_store_kv {heads} and {kv_heads} x E{head_dim} {dtype}",
        kernel=rotary_store_kernel,
        signature=pointers | {"slots": "*i64"} | pitches | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*pointers, *pitches),
        num_warps=warps(heads, head_dim),
        num_stages=3,
        expects=frozenset(),
    )


SPECS = [_spec(*layout, dtype=dtype) for layout in LAYOUTS for dtype in ("bf16", "fp16", "fp32")]
