"""Triton's interpreter, for kernels on CPU tensors: it must be chosen before triton is imported first.

The interpreter keeps bfloat16 as its bits and multiplies those (triton issue 11584), and makes integers of what should
become bfloat16; both are put right here.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_dot, _si_to_fp = _Builder.create_dot, _Builder.create_si_to_fp


def _widen(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    bits = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widen(a), _widen(b), *rest)


def _create_si_to_fp(self: Any, source: Any, target: Any) -> Any:
    if target.scalar != tl.bfloat16:
        return _si_to_fp(self, source, target)
    bits = interpreter._convert_float(source.data.astype(np.float32), tl.float32, tl.bfloat16, None)
    return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)


_Builder.create_dot, _Builder.create_si_to_fp = _create_dot, _create_si_to_fp
