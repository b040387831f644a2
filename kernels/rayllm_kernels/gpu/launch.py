"""The one door through which a kernel is launched: on the device of its tensors, whichever is the current one.

Triton launches on the current device, which need not be that of the tensors: a process may use several.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction


def launch_kernel(kernel: JITFunction, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`options`: the kernel's compile-time arguments, `num_warps` and `num_stages`."""
    with device_of(arguments):
        kernel[grid](*arguments, **options)


def device_of(arguments: Sequence[Any]) -> torch.cuda.device:
    """Enters the device of the first tensor; does nothing where that is the CPU, as under the interpreter."""
    tensor: Tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    return torch.cuda.device(tensor.get_device())  # -1 on CPU, which enters nothing
