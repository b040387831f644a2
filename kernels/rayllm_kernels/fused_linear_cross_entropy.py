"""Cross-entropy of a vocabulary projection without its logits: [T, V] is never held, only some rows of it at a time.

Gradients are made together with the loss, chunk by chunk, since that is when the logits are there (as in Liger kernels'
FusedLinearCrossEntropy, Hsu et al. 2024); backward only scales them. What is kept is of the size of hidden and weight.

The loss is a sum. By how many tokens to divide it is known to whoever sees all ranks and micro-steps.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels.dispatch import loops_may_run, on_triton
from rayllm_kernels.native import Kernel, integer, next_task
from rayllm_kernels.simd import (
    LANES,
    add,
    broadcast,
    exp,
    larger,
    load,
    load_bf16,
    load_f32,
    load_f32_from_bf16,
    load_i64,
    max_lanes,
    mul,
    store,
    store_bf16,
    store_bf16_scalar,
    store_f32,
    sub,
    sum_lanes,
)

_CHUNK_LOGITS = 1 << 26  # of a chunk, about: 128 MiB in bfloat16


def fused_linear_cross_entropy_reference(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int = -100
) -> Tensor:
    """The contract of `fused_linear_cross_entropy` in plain torch, on any device and under autograd."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = F.linear(hidden_TD, weight_VD).to(wide)
    return F.cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, reduction="sum")


def _softmax_rows(block: int) -> None:
    """Kernel: task = row of logits, which becomes the loss's gradient by them; `ignored` rows become zero."""
    logits, targets, losses = integer(block, 0), integer(block, 1), integer(block, 2)
    ignored, size, is_bf16 = integer(block, 3), integer(block, 4), integer(block, 5)
    item = 2 if is_bf16 else 4
    zero = broadcast(np.float32(0.0))
    task = next_task(block)
    while task >= 0:
        row, target = logits + task * size * item, load_i64(targets + 8 * task)
        if target == ignored:
            store_f32(losses + 4 * task, np.float32(0.0))
            for i in range(0, size * item, 4 * LANES):  # bytes are bytes
                store(row + i, zero)
        else:
            peak = broadcast(np.float32(-np.inf))
            for i in range(0, size * item, LANES * item):
                peak = larger(load_bf16(row + i) if is_bf16 else load(row + i), peak)
            largest = max_lanes(peak)
            peak, total = broadcast(largest), zero
            for i in range(0, size * item, LANES * item):
                total = add(total, exp(sub(load_bf16(row + i) if is_bf16 else load(row + i), peak)))
            whole, wanted = sum_lanes(total), row + target * item
            logit = load_f32_from_bf16(wanted) if is_bf16 else load_f32(wanted)
            loss = np.float32(math.log(whole) - (float(logit) - float(largest)))
            share = broadcast(np.float32(1.0) / whole)
            for i in range(0, size * item, LANES * item):
                if is_bf16:
                    store_bf16(row + i, mul(exp(sub(load_bf16(row + i), peak)), share))
                else:
                    store(row + i, mul(exp(sub(load(row + i), peak)), share))
            slope = np.float32(math.expm1(-loss))
            if is_bf16:
                store_bf16_scalar(wanted, slope)
            else:
                store_f32(wanted, slope)
            store_f32(losses + 4 * task, loss)
        task = next_task(block)


_softmax_rows_kernel = Kernel(_softmax_rows, integers=6, parallel_from=2)


def fused_linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int = -100
) -> Tensor:
    """-> the sum over tokens of -log softmax(hidden @ weight.T)[target], in float32 (float64 for float64).

    Tokens whose target is `ignore_index` give neither loss nor gradient; all other targets, int64, lie in [0, V). The
    logits are rounded to the dtype of hidden and weight. Differentiable once, by hidden and weight.
    """
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden and weight must have one dtype, not {hidden_TD.dtype} and {weight_VD.dtype}")
    if hidden_TD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1] or targets_T.shape != hidden_TD.shape[:1]:
        shapes = f"hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)}, targets {tuple(targets_T.shape)}"
        raise ValueError(f"expected hidden [T, D], weight [V, D] and targets [T], not {shapes}")
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_TD, weight_VD)]
    loss: Tensor = _loss_and_gradients(hidden_TD, weight_VD, targets_T, ignore_index, *wanted)[0]
    return loss


@torch.library.custom_op("rayllm::fused_linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, hidden_wanted: bool, weight_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the loss and its gradients by hidden and weight; those that are not wanted are empty."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    dhidden = torch.empty(hidden.shape if hidden_wanted else (0,), dtype=hidden.dtype, device=hidden.device)
    dweight = torch.zeros(weight.shape if weight_wanted else (0,), dtype=wide, device=weight.device)
    rows = min(max(1, _CHUNK_LOGITS // weight.shape[0]), hidden.shape[0])
    buffer = hidden.new_empty(rows, weight.shape[0])
    for first in range(0, hidden.shape[0], max(1, rows)):
        chunk = slice(first, first + rows)
        logits = torch.mm(hidden[chunk], weight.T, out=buffer[: hidden.shape[0] - first])
        loss += _losses(logits, targets[chunk], ignore_index).sum()
        if hidden_wanted:
            torch.mm(logits, weight, out=dhidden[chunk])
        if weight_wanted and dweight.dtype == weight.dtype:
            dweight.addmm_(logits.T, hidden[chunk])
        elif weight_wanted:
            dweight += logits.T @ hidden[chunk]
    return loss, dhidden, dweight.to(weight.dtype)


@_loss_and_gradients.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, hidden_wanted: bool, weight_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)),
        hidden.new_empty(hidden.shape if hidden_wanted else (0,)),
        weight.new_empty(weight.shape if weight_wanted else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2])
    ctx.wanted = inputs[4:]


def _differentiate(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = (
        _scaled(gradient, dloss) if dloss is not None and wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return (*gradients, None, None, None, None)


def _scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    """In the dtype of the gradient, from a product in that of the loss: a tensor without dimensions would be rounded to
    the gradient's dtype first."""
    return torch.mul(gradient, dloss.view(1, 1), out=torch.empty_like(gradient))


_loss_and_gradients.register_autograd(_differentiate, setup_context=_save)


def _losses(logits_CV: Tensor, targets_C: Tensor, ignore_index: int) -> Tensor:
    """-> each token's loss; `logits_CV` becomes its gradient by them."""
    if on_triton("fused_linear_cross_entropy", logits_CV) and logits_CV.dtype != torch.float64:
        from rayllm_kernels.gpu.cross_entropy import losses_and_gradients

        return losses_and_gradients(logits_CV, targets_C, ignore_index)
    if _compiled(logits_CV) and targets_C.is_contiguous():
        strange_C = (targets_C != ignore_index) & ((targets_C < 0) | (targets_C >= logits_CV.shape[1]))
        if strange_C.any():
            raise IndexError(f"target {targets_C[strange_C][0]} is not among {logits_CV.shape[1]} tokens")
        losses_C = torch.empty(len(targets_C))
        _softmax_rows_kernel(
            len(targets_C),
            logits_CV.data_ptr(),
            targets_C.data_ptr(),
            losses_C.data_ptr(),
            ignore_index,
            logits_CV.shape[1],
            logits_CV.dtype == torch.bfloat16,
        )
        return losses_C
    counted_C = targets_C != ignore_index
    targets_C1 = torch.where(counted_C, targets_C, 0)[:, None]
    log_probs_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)).log_softmax(-1)
    losses_C = torch.where(counted_C, -log_probs_CV.gather(1, targets_C1)[:, 0], 0)
    dlogits_CV = log_probs_CV.exp_()
    dlogits_CV.scatter_add_(1, targets_C1, dlogits_CV.new_full(targets_C1.shape, -1.0))
    logits_CV.copy_(dlogits_CV.masked_fill_(~counted_C[:, None], 0))
    return losses_C


def _compiled(logits_CV: Tensor) -> bool:
    """Whether the compiled kernel takes these."""
    is_float = logits_CV.dtype == torch.bfloat16 or logits_CV.dtype == torch.float32
    return loops_may_run(logits_CV) and is_float and logits_CV.shape[1] % (2 * LANES) == 0
