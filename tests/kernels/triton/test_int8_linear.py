"""The Triton int8 products in the interpreter against float64, on shapes that no tile divides."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rayllm_kernels import int8_linear, w8a8_linear, w8a16_linear
from rayllm_kernels.gpu import int8_linear as gpu
from rayllm_kernels.gpu.int8_linear import Tiles
from rayllm_kernels.int8_linear import quantize_rows_reference, row_bounds_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SMALL = Tiles(t=16, n=32, k=64, num_warps=4, num_stages=1)
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-20}


def make(rows: int, outputs: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + outputs * length)
    x = torch.randn(rows, length, generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (outputs, length), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, 1, generator=generator) / 100
    return x, weight, scale, torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 50, 128, gpu.LONGEST + 50])
def test_quantize_rows(dtype: torch.dtype, length: int) -> None:
    x = make(5, 1, length, dtype)[0]
    x[2] = 0
    q, scale, kept = gpu.quantize_rows(x, None, None)
    expected_q, expected_scale = quantize_rows_reference(x)
    assert torch.equal(q, expected_q)
    torch.testing.assert_close(scale, expected_scale, rtol=2**-23, atol=0)
    assert kept.shape == (5, 0)
    if length > 3:
        columns = torch.tensor([length - 1, 0, 3, *range(4, 44)], dtype=torch.int32)
        x[:, columns] *= 30
        q, scale, kept = gpu.quantize_rows(x, columns, None)
        rest = x.index_fill(1, columns.long(), 0)
        assert torch.equal(q, quantize_rows_reference(rest)[0])
        assert torch.equal(kept, x[:, columns])
        assert torch.equal(gpu.row_bounds(x, columns), row_bounds_reference(x, columns))
    x[1, 0] = x[3, length - 1] = torch.nan
    assert gpu.quantize_rows(x, None, None)[1].isnan().squeeze().tolist() == [False, True, False, True, False]
    assert gpu.row_bounds(x, None).isnan().squeeze().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed", [False, True])
def test_slices_of_rows_with_the_bounds_of_the_whole(dtype: torch.dtype, mixed: bool) -> None:
    x, columns = make(5, 1, 75, dtype)[0], torch.tensor([70, 0, 3, 24, 25], dtype=torch.int32)
    x[2] = 0
    x[:, columns] *= 30
    rest = x.index_fill(1, columns.long(), 0) if mixed else x
    whole_q, whole_scale = quantize_rows_reference(rest)
    whole_bound = row_bounds_reference(rest)
    for first in (0, 25, 50):
        part = x[:, first : first + 25].contiguous()
        mine = columns[(columns >= first) & (columns < first + 25)] - first if mixed else None
        assert torch.equal(gpu.row_bounds(part, mine), row_bounds_reference(part, mine))
        q, scale, kept = gpu.quantize_rows(part, mine, whole_bound)
        assert torch.equal(q, whole_q[:, first : first + 25])
        torch.testing.assert_close(scale, whole_scale, rtol=2**-23, atol=0)
        assert torch.equal(kept, part[:, :0] if mine is None else part[:, mine])
    x[1, 0] = torch.nan
    assert gpu.row_bounds(x, None).isnan().squeeze().tolist() == [False, True, False, False, False]
    assert gpu.quantize_rows(x[:, 1:].contiguous(), None, gpu.row_bounds(x, None))[1].isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "length"), [(1, 7, 50), (17, 33, 128), (20, 64, 200)])
@pytest.mark.parametrize("count", [0, 3, 37])
def test_w8a8(dtype: torch.dtype, rows: int, outputs: int, length: int, count: int) -> None:
    x, weight, scale, bias = make(rows, outputs, length, dtype)
    columns = torch.randperm(length)[:count].int() if count else None
    outlier_weight = torch.randn(count, outputs).bfloat16() if count else None
    q, x_scale, kept = gpu.quantize_rows(x, columns, None)
    for b in (None, bias):
        if count and dtype == torch.float32:  # no tiles of ours
            result = gpu.w8a8_product(q, x_scale, weight, scale, b, kept, outlier_weight)
        else:
            result = gpu.launch_w8a8(q, x_scale, weight, scale, b, kept, outlier_weight, SMALL)
        product = (q.double() @ weight.double().T) * x_scale.double() * scale.double().T
        mixed = kept.double() @ outlier_weight.double() if outlier_weight is not None else torch.zeros(())
        exact = product + mixed + (0 if b is None else b.double())
        assert result.dtype == dtype
        # fp16 holds no bfloat16 weight below 2**-24 of it; the sums are float32 and rounded once
        bound = EPS[dtype] * exact.abs() + 2**-11 * (mixed.abs().max() if dtype == torch.float16 else 0) + 1e-4
        assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "length"), [(1, 7, 50), (17, 33, 128), (3, 64, 400)])
@pytest.mark.parametrize("splits", [1, 3])
def test_w8a16(dtype: torch.dtype, rows: int, outputs: int, length: int, splits: int) -> None:
    x, weight, scale, bias = make(rows, outputs, length, dtype)
    for b in (None, bias):
        result = gpu.launch_w8a16(x, weight, scale, b, SMALL, splits)
        exact = (x.double() @ weight.double().T) * scale.double().T + (0 if b is None else b.double())
        assert result.dtype == dtype
        assert ((result.double() - exact).abs() <= EPS[dtype] * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("product", [w8a8_linear, w8a16_linear])
def test_a_part_of_wider_rows(product: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_linear, "on_triton", lambda *_: True)
    wide, weight, scale, bias = make(5, 32, 256, torch.float32)
    part, weight = wide[:, :128], weight[:, :128].contiguous()
    with torch.no_grad():
        assert torch.equal(product(part, weight, scale, bias), product(part.contiguous(), weight, scale, bias))


def test_rows_past_the_end_are_not_written() -> None:
    x, weight, scale, _ = make(3, 32, 64, torch.float32)
    q, x_scale, _ = gpu.quantize_rows(x, None, None)
    whole = torch.full((5, 32), torch.nan)
    gpu.w8a8_kernel[(1,)](
        q, weight, x_scale, scale, None, None, None, whole, 3, 32, 64, 0,
        BLOCK_T=16, BLOCK_N=32, BLOCK_K=64, BLOCK_J=32, GROUP=8, WHOLE_K=True, OUTLIERS=False, HAS_BIAS=False,
    )  # fmt: skip
    assert whole[:3].isfinite().all()
    assert whole[3:].isnan().all()


def test_operators_are_registered_as_torch_asks() -> None:
    """opcheck: schema, fake kernel, and tracing with dynamic shapes."""
    x, weight, scale, bias = make(3, 7, 50, torch.float32)
    columns = torch.tensor([4, 9], dtype=torch.int32)
    bound = gpu.row_bounds(x, columns)
    q, x_scale, kept = gpu.quantize_rows(x, columns, None)
    for operator, arguments in (
        (gpu.row_bounds, (x, columns)),
        (gpu.quantize_rows, (x, columns, None)),
        (gpu.quantize_rows, (x, columns, bound)),
        (gpu.w8a8_product, (q, x_scale, weight, scale, bias, kept, torch.randn(2, 7).bfloat16())),
        (gpu.w8a16_product, (x, weight, scale, bias)),
        (gpu.w8a16_product, (x.bfloat16(), weight, scale, None)),
    ):
        torch.library.opcheck(operator, arguments)
