"""int8 products on a GPU against float64, every configuration that ships."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels import quantize_rows, quantize_rows_reference, row_bounds, w8a8_linear, w8a16_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = [torch.bfloat16, torch.float16]
# Results are rounded once, to 8 or 11 bits; float16 rounds the bfloat16 weights of outlier columns below 2**-14 too
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 96, 576), (16, 4096, 4096), (33, 1056, 640), (64, 256, 1024), (200, 320, 1536), (1024, 4096, 4096)]


@pytest.mark.parametrize(("rows", "outputs", "length"), SHAPES)
@pytest.mark.parametrize("count", [0, 5, 40])
@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a8(
    rows: int,
    outputs: int,
    length: int,
    count: int,
    choice: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rayllm_kernels.gpu import int8_linear as gpu

    monkeypatch.setattr(
        gpu,
        "tiles_for",
        lambda table, rows: next(tiles[min(choice, len(tiles) - 1)] for most, tiles in table.items() if rows <= most),
    )
    torch.manual_seed(rows)
    x = torch.randn(rows, length, device="cuda").to(dtype)
    weight = torch.randint(-127, 128, (outputs, length), dtype=torch.int8, device="cuda")
    scale, bias = torch.rand(outputs, 1, device="cuda") / 100, torch.randn(outputs, device="cuda").to(dtype)
    columns = torch.randperm(length, device="cuda")[:count].int()
    outlier_weight = torch.randn(count, outputs, device="cuda").bfloat16().t()
    x[:, columns.long()] *= 30
    result = w8a8_linear(x, weight, scale, bias, outlier_columns_J=columns, outlier_weight_NJ=outlier_weight)
    q, x_scale = quantize_rows_reference(x.index_fill(1, columns.long(), 0))
    exact = (q.double() @ weight.double().T) * x_scale.double() * scale.double().T
    exact += x[:, columns.long()].double() @ outlier_weight.double().T + bias.double()
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=EPS[dtype], atol=1e-3)


@pytest.mark.parametrize(("rows", "outputs", "length"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a16(rows: int, outputs: int, length: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, length, device="cuda").to(dtype)
    weight = torch.randint(-127, 128, (outputs, length), dtype=torch.int8, device="cuda")
    scale, bias = torch.rand(outputs, 1, device="cuda") / 100, torch.randn(outputs, device="cuda").to(dtype)
    exact = (x.double() @ weight.double().T) * scale.double().T + bias.double()
    result = w8a16_linear(x, weight, scale, bias)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=EPS[dtype], atol=1e-3)
    assert torch.equal(result, w8a16_linear(x, weight, scale, bias))


@pytest.mark.parametrize("rows", [1, 33, 64, 200])
@pytest.mark.parametrize("count", [0, 40])
def test_w8a8_of_float32(rows: int, count: int) -> None:
    """Outlier columns are torch's there; with or without them 64 rows and more take the tiles of tensor cores."""
    torch.manual_seed(rows)
    x, weight, scale = _operands(rows, 320, 1536, torch.float32)
    bias, columns = torch.randn(320, device="cuda"), torch.randperm(1536, device="cuda")[:count].int()
    outlier_weight = torch.randn(count, 320, device="cuda").bfloat16().t()
    q, x_scale = quantize_rows(x, outlier_columns_J=columns)
    exact = (q.double() @ weight.double().T) * x_scale.double() * scale.double().T
    exact += x[:, columns.long()].double() @ outlier_weight.double().T + bias.double()
    result = w8a8_linear(x, weight, scale, bias, outlier_columns_J=columns, outlier_weight_NJ=outlier_weight)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [17, 64, 300])
def test_cublas_gives_the_same_integers(rows: int) -> None:
    from rayllm_kernels.gpu import int8_linear as gpu

    q = torch.randint(-127, 128, (rows, 1024), dtype=torch.int8, device="cuda")  # whose sums float32 holds exactly
    weight = torch.randint(-127, 128, (320, 1024), dtype=torch.int8, device="cuda")
    ones, none = torch.ones(max(rows, 320), 1, device="cuda"), torch.empty(rows, 0, device="cuda")
    sums = gpu.w8a8_product(q, ones[:rows], weight, ones[:320], None, none, None)
    assert torch.equal(sums, torch._int_mm(q, weight.t()).float())


@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cublas_gives_the_same(rows: int, dtype: torch.dtype) -> None:
    x, weight, scale = _operands(rows, 320, 1024, dtype)
    theirs = F.linear(x, (weight * scale).to(dtype))
    largest = theirs.abs().max().item()
    torch.testing.assert_close(w8a16_linear(x, weight, scale), theirs, rtol=2e-2, atol=1e-2 * largest)
    torch.testing.assert_close(w8a8_linear(x, weight, scale), theirs, rtol=2e-2, atol=3e-2 * largest)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_in_a_cuda_graph(rows: int, dtype: torch.dtype) -> None:
    x, weight, scale = _operands(rows, 320, 1024, dtype)
    columns = torch.arange(20, device="cuda", dtype=torch.int32)
    outlier_weight = torch.randn(20, 320, device="cuda").bfloat16().t()

    def step() -> Tensor:
        y = w8a8_linear(x, weight, scale, outlier_columns_J=columns, outlier_weight_NJ=outlier_weight)
        return y + w8a16_linear(x, weight, scale)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, step())


def _operands(rows: int, outputs: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """-> x, int8 weight, its scales."""
    x = torch.randn(rows, length, device="cuda").to(dtype)
    weight = torch.randint(-127, 128, (outputs, length), dtype=torch.int8, device="cuda")
    return x, weight, torch.rand(outputs, 1, device="cuda") / 100


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("length", [576, 4096, 65536])
def test_quantize_rows(length: int, dtype: torch.dtype) -> None:
    x = torch.randn(100, length, device="cuda").to(dtype)
    q, scale = quantize_rows(x)
    expected_q, expected_scale = quantize_rows_reference(x)
    torch.testing.assert_close(scale, expected_scale, rtol=2**-22, atol=0)
    assert (q.int() - expected_q.int()).abs().max() <= 1
    assert (q != expected_q).float().mean() < 1e-3


@pytest.mark.parametrize("count", [0, 5])
def test_slices_of_rows_with_the_bounds_of_the_whole(count: int) -> None:
    """Three slices add up to the whole: the same integers, and float32 sums."""
    torch.manual_seed(0)
    x = torch.randn(100, 3072, device="cuda")
    weight = torch.randint(-127, 128, (256, 3072), dtype=torch.int8, device="cuda")
    scale = torch.rand(256, 1, device="cuda") / 100
    columns = torch.randperm(3072, device="cuda")[:count].int()
    outlier_weight = torch.randn(count, 256, device="cuda").bfloat16().t()
    x[:, columns.long()] *= 30
    bound = row_bounds(x, columns)
    assert torch.equal(bound, x.index_fill(1, columns.long(), 0).abs().amax(1, keepdim=True))
    parts = []
    for first in range(0, 3072, 1024):
        mine = (columns >= first) & (columns < first + 1024)
        parts.append(
            w8a8_linear(
                x[:, first : first + 1024],
                weight[:, first : first + 1024].contiguous(),
                scale,
                outlier_columns_J=columns[mine] - first,
                outlier_weight_NJ=outlier_weight[:, mine],
                row_bound_T1=bound,
            )
        )
    whole = w8a8_linear(x, weight, scale, outlier_columns_J=columns, outlier_weight_NJ=outlier_weight)
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-5, atol=1e-3)
