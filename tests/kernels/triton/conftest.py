"""Triton's interpreter: kernels on CPU tensors, by numpy. It has to be chosen before triton is imported first.

So these tests run in a process of their own, `TRITON_INTERPRET=1 pytest tests/kernels/triton` (transformers,
which other tests import, may import triton), and are left out where their folder is not named.

The interpreter keeps bfloat16 as its bits: it multiplies those as integers (triton issue 11584), cuts instead of
rounding, and makes integers of what should become bfloat16. Here bfloat16 becomes what a GPU makes of it.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("run these tests as: TRITON_INTERPRET=1 pytest tests/kernels/triton")

import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_dot, _cast = _Builder.create_dot, _Builder.cast_impl


def _widen(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widen(a), _widen(b), *rest)


def _cast_impl(self: Any, source: Any, target: Any) -> Any:
    source = _widen(source)
    if target.scalar != tl.bfloat16:
        return _cast(self, source, target)
    return interpreter.TensorHandle(_bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)


_Builder.create_dot, _Builder.cast_impl = _create_dot, _cast_impl


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What nobody wrote is NaN, or the largest integer: of results, and of scratch memory."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
