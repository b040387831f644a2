"""linear against float64 through each of its products, chosen by the limits."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels import linear
from rayllm_kernels.amx import amx_problem
from rayllm_kernels.dispatch import LinearLimits, linear_limits

ALL_ROWS = 10**9
PRODUCTS = {
    "vector": LinearLimits(vector_float32=ALL_ROWS, vector_bfloat16=ALL_ROWS, tile_bfloat16=0),
    "tile": LinearLimits(vector_float32=0, vector_bfloat16=0, tile_bfloat16=ALL_ROWS),
}
needs_tiles = pytest.mark.skipif(amx_problem() is not None, reason=f"no AMX tiles: {amx_problem()}")


def make(rows: int, outputs: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * outputs + length)
    shapes = ((rows, length), (outputs, length), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


@pytest.fixture
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make one product serve every call, and torch's none."""
    name: str = request.param
    module = sys.modules["rayllm_kernels.linear"]
    monkeypatch.setattr(module, "linear_limits", lambda: PRODUCTS[name])

    def refuse(*_: object) -> Tensor:
        raise AssertionError("served by torch")

    monkeypatch.setattr(module, "linear_reference", refuse)
    return name


CASES = [
    pytest.param("vector", torch.float32, id="vector-float32"),
    pytest.param("vector", torch.bfloat16, id="vector-bfloat16"),
    pytest.param("tile", torch.bfloat16, id="tile-bfloat16", marks=needs_tiles),
]


@torch.inference_mode()
@pytest.mark.parametrize(("product", "dtype"), CASES, indirect=["product"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 17, 32, 33, 65])
@pytest.mark.parametrize(("outputs", "length"), [(96, 576), (32, 32), (320, 1536), (1056, 64)])
def test_every_product(product: str, dtype: torch.dtype, rows: int, outputs: int, length: int) -> None:
    x, weight, bias = make(rows, outputs, length, dtype)
    exact = x.double() @ weight.double().T
    # Sums of `length` products of order one: float32 loses 2**-24 of their size; bfloat16 rounds the result by 2**-9.
    loss = 2**-8 if dtype == torch.bfloat16 else 0.0
    for b in (None, bias):
        result = linear(x, weight, b)
        expected = exact if b is None else exact + b.double()
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=loss, atol=2**-20 * length**0.5)


@torch.inference_mode()
@pytest.mark.parametrize("product", ["vector"], indirect=True)
@pytest.mark.parametrize("outputs", [4, 5, 6, 7, 50, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_that_blocks_do_not_divide(product: str, dtype: torch.dtype, outputs: int) -> None:
    for rows in (1, 3):
        x, weight, bias = make(rows, outputs, 96, dtype)
        expected = x.double() @ weight.double().T + bias.double()
        loss = 2**-8 if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=loss, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("product", "dtype"), CASES, indirect=["product"])
def test_a_row_does_not_depend_on_the_others(product: str, dtype: torch.dtype) -> None:
    x, weight, _ = make(40, 64, 576, dtype)
    together = linear(x, weight)
    for i in (0, 15, 16, 39):
        assert torch.equal(linear(x[i : i + 1], weight)[0], together[i])


@torch.inference_mode()
@pytest.mark.parametrize(("product", "dtype"), CASES, indirect=["product"])
def test_the_number_of_threads_changes_nothing(product: str, dtype: torch.dtype) -> None:
    x, weight, _ = make(5, 2048, 576, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@torch.inference_mode()
@pytest.mark.parametrize(("product", "dtype"), CASES, indirect=["product"])
def test_nan_and_infinity_stay_visible(product: str, dtype: torch.dtype) -> None:
    x, weight, _ = make(2, 32, 64, dtype)
    weight[3, 5] = torch.nan
    weight[4, 6] = torch.inf
    result = linear(x, weight)
    assert result[:, 3].isnan().all()
    assert result[:, 4].isinf().all()
    assert result[:, 5:].isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leading_dimensions_and_shapes_that_only_torch_serves(dtype: torch.dtype) -> None:
    x, weight, bias = make(6, 64, 64, dtype)
    assert linear(x.view(2, 3, 64), weight).shape == (2, 3, 64)
    assert linear(x[:0], weight, bias).shape == (0, 64)
    odd_x, odd_weight, _ = make(2, 3, 50, dtype)
    assert torch.equal(linear(odd_x, odd_weight), F.linear(odd_x, odd_weight))
    assert torch.equal(linear(x[:, ::2], weight[:, ::2]), F.linear(x[:, ::2], weight[:, ::2]))


def test_gradients_are_torchs() -> None:
    x, weight, bias = make(1, 64, 64, torch.float32)
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.expand(64, -1))


def test_limits_name_a_product_only_where_it_runs() -> None:
    limits = linear_limits()
    assert limits is linear_limits()
    assert (limits.tile_bfloat16 > 0) == (amx_problem() is None)
