"""The norm that ends in int8, by Triton's interpreter: bit by bit the two kernels that it joins, and near float64."""

import pytest
import torch
from torch import Tensor

from rayllm_kernels import rms_norm_reference
from rayllm_kernels.gpu import int8_linear, rms_norm
from rayllm_kernels.gpu import rms_norm_int8 as op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def make(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + size)
    return (
        torch.randn(rows, size, generator=generator).mul(3).to(dtype),
        torch.randn(rows, size, generator=generator).to(dtype),
        torch.randn(size, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (5, 80), (3, 50), (70, 17), (1, 1), (2, 4100)])
def test_equals_norm_then_quantization(rows: int, size: int, dtype: torch.dtype) -> None:
    x, residual, weight = make(rows, size, dtype)
    q, scale = op.rms_norm_int8(x, weight, EPS)
    normed = rms_norm.rms_norm(x, weight, EPS)
    expected = int8_linear.quantize_rows(normed, None, None)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
    q, scale, summed = op.add_rms_norm_int8(x, residual, weight, EPS)
    normed, expected_sum = rms_norm.add_rms_norm(x, residual, weight, EPS)
    expected = int8_linear.quantize_rows(normed, None, None)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
    assert torch.equal(summed, expected_sum)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_step_from_float64(dtype: torch.dtype) -> None:
    x, _, weight = make(7, 300, dtype)
    q, scale = op.rms_norm_int8(x, weight, EPS)
    exact = rms_norm_reference(x.double(), weight.double(), EPS)
    rounding = 2 * (rms_norm_reference(x, weight, EPS).double() - exact).abs().amax(1, keepdim=True)
    allowed = 0.5 * scale.double() + rounding + 1e-6 * exact.abs().amax(1, keepdim=True)
    assert ((q.double() * scale.double() - exact).abs() <= allowed).all()
    assert (q.abs().amax(1) == 127).all()


def test_rows_of_zeros_and_of_nan() -> None:
    x, _, weight = make(4, 40, torch.float32)
    x[1], x[2, 7] = 0, torch.nan
    q, scale = op.rms_norm_int8(x, weight, EPS)
    assert scale[1] == 0
    assert q[1:3].abs().sum() == 0
    assert scale.isnan().squeeze().tolist() == [False, False, True, False]
    assert op.rms_norm_int8(x[:0], weight, EPS)[0].shape == (0, 40)


def test_operators_are_registered_as_torch_asks() -> None:
    x, residual, weight = make(3, 48, torch.float32)
    torch.library.opcheck(op.rms_norm_int8, (x, weight, EPS))
    torch.library.opcheck(op.add_rms_norm_int8, (x, residual, weight, EPS))


def test_supports() -> None:
    x, residual, weight = make(4, 40, torch.bfloat16)
    assert op.supports(x, weight)
    assert op.supports_sum(x, residual, weight)
    assert not op.supports(x[:, ::2], weight[::2])
    assert not op.supports(x[None], weight)
    assert not op.supports(x, weight.float())
    assert not op.supports_sum(x, residual[:2], weight)
