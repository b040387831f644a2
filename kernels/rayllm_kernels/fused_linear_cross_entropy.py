"""Cross-entropy of a vocabulary projection without its logits: [T, V] is never held, only some rows of it at a time.

Gradients are made together with the loss, chunk by chunk, since that is when the logits are there (as in Liger kernels'
FusedLinearCrossEntropy, Hsu et al. 2024); backward only scales them. What is kept is of the size of hidden and weight.

The loss is a sum. By how many tokens to divide it is known to whoever sees all ranks and micro-steps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels.dispatch import on_triton

_CHUNK_LOGITS = 1 << 26  # of a chunk, about: 128 MiB in bfloat16


def fused_linear_cross_entropy_reference(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int = -100
) -> Tensor:
    """The contract of `fused_linear_cross_entropy` in plain torch, on any device and under autograd."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = F.linear(hidden_TD, weight_VD).to(wide)
    return F.cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, reduction="sum")


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
    rows = max(1, _CHUNK_LOGITS // weight.shape[0])
    for first in range(0, hidden.shape[0], rows):
        chunk = slice(first, first + rows)
        logits = hidden[chunk] @ weight.T
        loss += _losses(logits, targets[chunk], ignore_index).sum()
        if hidden_wanted:
            torch.mm(logits, weight, out=dhidden[chunk])
        if weight_wanted:
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
    counted_C = targets_C != ignore_index
    targets_C1 = torch.where(counted_C, targets_C, 0)[:, None]
    log_probs_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)).log_softmax(-1)
    losses_C = torch.where(counted_C, -log_probs_CV.gather(1, targets_C1)[:, 0], 0)
    dlogits_CV = log_probs_CV.exp_()
    dlogits_CV.scatter_add_(1, targets_C1, dlogits_CV.new_full(targets_C1.shape, -1.0))
    logits_CV.copy_(dlogits_CV.masked_fill_(~counted_C[:, None], 0))
    return losses_C
