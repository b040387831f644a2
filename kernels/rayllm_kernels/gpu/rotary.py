"""`apply_rotary` in Triton: `torch.ops.rayllm.rotary`. Its gradient is the rotation by the opposite angles."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.spec import Spec


@triton.jit
def rotate_heads(
    source: tl.tensor,
    target: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INVERSE: tl.constexpr,
) -> None:
    """All heads of one token, side by side at `source` and at `target`; `cos` and `sin` are the token's."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head, element = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS)[:, None] & (element < HALF)[None, :]
    at = head[:, None] * HEAD_DIM + element[None, :]
    c = tl.load(cos + HALF + element, element < HALF, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + HALF + element, element < HALF, 0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    low = tl.load(source + at, inside, 0.0).to(tl.float32)
    high = tl.load(source + HALF + at, inside, 0.0).to(tl.float32)
    rounded = source.dtype.element_ty  # torch rounds each product before it adds
    new_low = (low * c).to(rounded).to(tl.float32) - (high * s).to(rounded).to(tl.float32)
    new_high = (high * c).to(rounded).to(tl.float32) + (low * s).to(rounded).to(tl.float32)
    tl.store(target + at, new_low.to(rounded).to(target.dtype.element_ty), inside)
    tl.store(target + HALF + at, new_high.to(rounded).to(target.dtype.element_ty), inside)


@triton.jit
def rotary_kernel(
    q: tl.tensor,
    k: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_pitch: tl.tensor,
    k_pitch: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INVERSE: tl.constexpr,
) -> None:
    """Program = token. Pitches: elements from one token to the next; outputs are dense."""
    token = tl.program_id(0).to(tl.int64)
    c, s = cos + token * HEAD_DIM, sin + token * HEAD_DIM
    q_to, k_to = q_out + token * (HEADS * HEAD_DIM), k_out + token * (KV_HEADS * HEAD_DIM)
    rotate_heads(q + token * q_pitch, q_to, c, s, HEADS, HEAD_DIM, BLOCK_H, BLOCK_HALF, INVERSE)
    rotate_heads(k + token * k_pitch, k_to, c, s, KV_HEADS, HEAD_DIM, BLOCK_K, BLOCK_HALF, INVERSE)


def head_tiles(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """The compile-time arguments that say how many heads there are."""
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_H": triton.next_power_of_2(heads),
        "BLOCK_K": triton.next_power_of_2(kv_heads),
        "BLOCK_HALF": triton.next_power_of_2(head_dim // 2),
    }


def warps(heads: int, head_dim: int) -> int:
    """32 elements of the queries to a thread, at most, up to 8 warps."""
    count: int = min(8, max(2, triton.next_power_of_2(heads * head_dim) // 1024))
    return count


def _readable(x: Tensor) -> Tensor:
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


@torch.library.custom_op("rayllm::rotary", mutates_args=())
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """For tensors that `supports` takes; `inverse`: by the opposite angles."""
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    q, k = _readable(q), _readable(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if tokens > 0:
        launch_kernel(
            rotary_kernel,
            (tokens,),
            q,
            k,
            q_out,
            k_out,
            cos.contiguous(),
            sin.contiguous(),
            q.stride(0),
            k.stride(0),
            **head_tiles(heads, kv_heads, head_dim),
            INVERSE=inverse,
            num_warps=warps(heads, head_dim),
        )
    return q_out, k_out


@rotary.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.inverse = inputs[4]


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return (*rotary(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None)


rotary.register_autograd(_differentiate, setup_context=_save)


def supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """One dtype for all, and angles that need no gradient."""
    return (
        q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q.shape[2] % 2 == 0
        and not (cos.requires_grad or sin.requires_grad)
    )


def _spec(heads: int, kv_heads: int, head_dim: int, *, dtype: str, inverse: bool) -> Spec:
    pointers = dict.fromkeys(("q", "k", "q_out", "k_out", "cos", "sin"), f"*{dtype}")
    pitches = dict.fromkeys(("q_pitch", "k_pitch"), "i32")
    constexprs: dict[str, object] = {**head_tiles(heads, kv_heads, head_dim), "INVERSE": inverse}
    return Spec(
        name=f"rotary {heads} and {kv_heads} x E{head_dim} {dtype}{' backward' if inverse else ''}",
        kernel=rotary_kernel,
        signature=pointers | pitches | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*pointers, *pitches),
        num_warps=warps(heads, head_dim),
        num_stages=3,
        expects=frozenset(),
    )


# The most that a thread holds is what 128 heads of 128 give it: the largest models, on one rank
LAYOUTS = ((9, 3, 64), (32, 8, 128), (128, 8, 128), (40, 40, 128), (16, 16, 256), (32, 32, 80))
SPECS = [
    _spec(*layout, dtype=dtype, inverse=inverse)
    for layout in LAYOUTS
    for dtype in ("bf16", "fp16", "fp32")
    for inverse in (False, True)
]
