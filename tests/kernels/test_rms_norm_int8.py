"""The norm that ends in int8, on CPU: what the norm and the quantization give one after the other."""

import pytest
import torch

from rayllm_kernels import (
    add_rms_norm,
    add_rms_norm_int8,
    add_rms_norm_int8_reference,
    quantize_rows,
    rms_norm,
    rms_norm_int8,
    rms_norm_int8_reference,
)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 576), (5, 64), (3, 50)])
def test_on_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], generator=generator).to(dtype)
    q, scale = rms_norm_int8(x, weight, 1e-5)
    expected_q, expected_scale = quantize_rows(rms_norm(x, weight, 1e-5))
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    q, scale, summed = add_rms_norm_int8(x, residual, weight, 1e-5)
    normed, expected_sum = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(q, quantize_rows(normed)[0])
    assert torch.equal(summed, expected_sum)
    # The references sum squares in another order: in bfloat16 a rare value of a row is rounded the other way
    for ours, reference in (
        (rms_norm_int8(x, weight, 1e-5), rms_norm_int8_reference(x, weight, 1e-5)),
        ((q, scale), add_rms_norm_int8_reference(x, residual, weight, 1e-5)[:2]),
    ):
        torch.testing.assert_close(ours[1], reference[1], rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)
        assert (ours[0].int() - reference[0].int()).abs().max() <= 1
        assert (ours[0] != reference[0]).float().mean() < 0.02
