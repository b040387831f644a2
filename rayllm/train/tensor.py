"""Tensor parallel for training: the plan that serving uses, given to torch.distributed.tensor.

A block's input and output are whole on every rank; between them a rank computes its own heads and its own part of the
ffn. Letters: D hidden, E head_dim.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from rayllm.models.layers import Attention, RMSNorm
from rayllm.parallel.plan import Style, style_of
from rayllm.train.lora import adapter_side, plain_name
from rayllm_kernels import rms_norm


def split_module(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Splits what the plan splits in `module`, whose weights are whole and the same on every rank, and which is `name`
    in the decoder: a block, an embedding or a head. Talks to no rank."""
    styles: dict[str, ParallelStyle] = {}
    for child, part in module.named_modules():
        style = style_of(plain_name(f"{name}.{child}.").rstrip("."))
        if (side := adapter_side(child)) is not None:
            if (adapter_style := _ADAPTERS[style, side]) is not None:
                styles[child] = adapter_style()
            continue
        match style if isinstance(part, nn.Linear | nn.Embedding) else None:
            case Style.COLUMN | Style.KV_COLUMN:
                styles[child] = ColwiseParallel()
            case Style.ROW:
                styles[child] = RowwiseParallel()
            case Style.VOCAB if isinstance(part, nn.Embedding):
                styles[child] = RowwiseParallel(input_layouts=Replicate())
            case Style.VOCAB:
                styles[child] = ColwiseParallel()
        if child in ("self_attn", "mlp"):
            # Once for all projections that read it: their gradients are summed before they are sent.
            rest = (None, None) if child == "self_attn" else ()
            whole = (Replicate(), *rest)
            styles[child] = PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole)
        if isinstance(part, Attention) and part.q_norm is not None and part.k_norm is not None:
            part.q_norm = HeadNorm(part.q_norm, mesh.get_group())
            part.k_norm = HeadNorm(part.k_norm, mesh.get_group())
    if "" in styles:
        parallelize_module(module, mesh, styles[""], src_data_rank=None)
    elif styles:
        parallelize_module(module, mesh, styles, src_data_rank=None)


class _Whole(ParallelStyle):
    """A layer whose weight, and what it gives for a whole input, are whole on every rank; the gradient of either is
    the sum over what ranks make of it."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = DTensor.from_local(parameter.detach(), device_mesh, [Replicate()], run_check=False)
            module.register_parameter(name, nn.Parameter(whole))
        return module


# A layer that is split by output has the outputs of B split, one that is split by input the inputs of A. What B gives
# in the latter is the same on all ranks, of what A's parts sum up to.
_ADAPTERS: Mapping[tuple[Style | None, str], Callable[[], ParallelStyle] | None] = {
    (Style.COLUMN, "A"): _Whole,
    (Style.COLUMN, "B"): ColwiseParallel,
    (Style.KV_COLUMN, "A"): _Whole,
    (Style.KV_COLUMN, "B"): ColwiseParallel,
    (Style.ROW, "A"): RowwiseParallel,
    (Style.ROW, "B"): None,
}


class HeadNorm(RMSNorm):
    """A norm over E that sees this rank's heads only: the gradient of its weight is the sum over the ranks."""

    def __init__(self, norm: RMSNorm, group: ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        shared: Tensor = _Shared.apply(self.weight, self._group)  # type: ignore[no-untyped-call]
        return rms_norm(x, shared, self.eps)


class _Shared(torch.autograd.Function):
    """The tensor itself, used by all ranks for different things."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
