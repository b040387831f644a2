"""The losses of some rows of logits in Triton, which replace the logits by their gradients.

Part of `fused_linear_cross_entropy`, whose operator is registered beside the contract. Each row is read twice: for its
maximum and sum (Milakov and Gimelshein 2018), and for its gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.spec import Spec

_BLOCK = 4096
_WARPS = 8


@triton.jit(do_not_specialize=["targets", "ignore_index"])
def cross_entropy_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    size: tl.tensor,
    ignore_index: tl.tensor,
    BLOCK_V: tl.constexpr,
) -> None:
    """Program = row. A row that is ignored is not read: whatever it holds becomes zero."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    row_logits = logits + row * size
    column = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        for first in range(0, size, BLOCK_V):
            zeros = tl.zeros((BLOCK_V,), tl.float32).to(logits.dtype.element_ty)
            tl.store(row_logits + first + column, zeros, first + column < size)
        tl.store(losses + row, 0.0)
    else:
        target_logit = tl.load(row_logits + target).to(tl.float32)
        level = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        for first in range(0, size, BLOCK_V):
            x = tl.load(row_logits + first + column, first + column < size, float("-inf")).to(tl.float32)
            new_level = tl.maximum(level, tl.max(x, 0))
            total = total * tl.exp2((level - new_level) * LOG2E) + tl.sum(tl.exp2((x - new_level) * LOG2E), 0)
            level = new_level
        tl.store(losses + row, tl.log2(total) / LOG2E + level - target_logit)
        tl.debug_barrier()  # every thread has read the target's logit, which is about to be replaced
        for first in range(0, size, BLOCK_V):
            x = tl.load(row_logits + first + column, first + column < size, float("-inf")).to(tl.float32)
            gradient = tl.exp2((x - level) * LOG2E) / total - tl.where(first + column == target, 1.0, 0.0)
            tl.store(row_logits + first + column, gradient.to(logits.dtype.element_ty), first + column < size)


def losses_and_gradients(logits_CV: Tensor, targets_C: Tensor, ignore_index: int) -> Tensor:
    """-> losses [C], float32; dense logits become their gradients."""
    rows, size = logits_CV.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    launch_kernel(
        cross_entropy_kernel,
        (rows,),
        logits_CV,
        targets_C,
        losses,
        size,
        ignore_index,
        BLOCK_V=_BLOCK,
        num_warps=_WARPS,
    )
    return losses


def _spec(dtype: str, *, odd: bool) -> Spec:
    """`odd`: V is no multiple of 16."""
    return Spec(
        name=f"cross_entropy {dtype}{', V not a multiple of 16' * odd}",
        kernel=cross_entropy_kernel,
        signature={
            "logits": f"*{dtype}",
            "targets": "*i64",
            "losses": "*fp32",
            "size": "i32",
            "ignore_index": "i32",
            "BLOCK_V": "constexpr",
        },
        constexprs={"BLOCK_V": _BLOCK},
        aligned=("logits", "losses", *(() if odd else ("size",))),
        num_warps=_WARPS,
        num_stages=3,
        expects=frozenset(),
    )


SPECS = [_spec(dtype, odd=odd) for dtype in ("bf16", "fp16", "fp32") for odd in (False, True)]
