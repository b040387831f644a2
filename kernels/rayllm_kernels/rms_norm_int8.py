"""RMSNorm whose result is made int8 row by row, as a W8A8 product takes it: the normalised rows are never written.

By definition `quantize_rows(rms_norm(x))`, and on one device the same bits: a row's values are rounded to the dtype of
x before its scale is taken. No gradients, and no outlier columns.

The layers of a model do not use it: there a norm hands a tensor of x's dtype to whichever linear layer follows, and a
pair of integers and scales would have to be understood by all of them. On a GPU `gpu.int8_linear.w8a8_product` takes
what comes out here; on CPU quantizing is part of the product for few rows and a small share of it for many
(`kernels/README.md`), so there is nothing to gain.
"""

from torch import Tensor

from rayllm_kernels.dispatch import on_triton
from rayllm_kernels.int8_linear import quantize_rows, quantize_rows_reference
from rayllm_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference


def rms_norm_int8_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The contract of `rms_norm_int8` in plain torch, on any device."""
    return quantize_rows_reference(rms_norm_reference(x_TD, weight_D, eps))


def add_rms_norm_int8_reference(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `add_rms_norm_int8` in plain torch, on any device."""
    normed_TD, summed_TD = add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)
    return (*quantize_rows_reference(normed_TD), summed_TD)


def rms_norm_int8(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> rms_norm(x) as int8 [T, D] and float32 scales [T, 1]."""
    if on_triton("rms_norm_int8", x_TD):
        from rayllm_kernels.gpu import rms_norm_int8 as gpu

        if gpu.supports(x_TD, weight_D):
            quantized: tuple[Tensor, Tensor] = gpu.rms_norm_int8(x_TD, weight_D, eps)
            return quantized
    return quantize_rows(rms_norm(x_TD, weight_D, eps))


def add_rms_norm_int8(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> rms_norm(residual + x) as int8 [T, D] and float32 scales [T, 1], and residual + x."""
    if on_triton("add_rms_norm_int8", x_TD):
        from rayllm_kernels.gpu import rms_norm_int8 as gpu

        if gpu.supports_sum(x_TD, residual_TD, weight_D):
            quantized: tuple[Tensor, Tensor, Tensor] = gpu.add_rms_norm_int8(x_TD, residual_TD, weight_D, eps)
            return quantized
    normed_TD, summed_TD = add_rms_norm(x_TD, residual_TD, weight_D, eps)
    return (*quantize_rows(normed_TD), summed_TD)
