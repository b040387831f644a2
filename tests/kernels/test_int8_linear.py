"""int8 products against float64 through each of their loops, chosen by the limits."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product as pairs

import pytest
import torch
from torch import Tensor

from rayllm_kernels import (
    pack_weight,
    quantize_rows,
    quantize_rows_reference,
    row_bounds,
    row_bounds_reference,
    w8a8_epilogue,
    w8a8_epilogue_reference,
    w8a8_linear,
    w8a8_linear_reference,
    w8a16_linear,
)
from rayllm_kernels.amx import amx_problem
from rayllm_kernels.dispatch import Int8Limits, int8_limits
from rayllm_kernels.int8_packed import unpack_weight

ALL_ROWS = 10**9
_VECTORS = Int8Limits(
    packed=False, tiles=False, vector_w8a8=ALL_ROWS, vector_float32=ALL_ROWS, vector_bfloat16=ALL_ROWS
)
LOOPS = {
    "packed": dataclasses.replace(_VECTORS, packed=True, vector_w8a8=0),  # it has no W8A16 of its own
    "vector": _VECTORS,
    "tile": Int8Limits(packed=False, tiles=True, vector_w8a8=0, vector_float32=0, vector_bfloat16=0),
    "torch": Int8Limits(packed=False, tiles=False, vector_w8a8=0, vector_float32=0, vector_bfloat16=0),
}
DTYPES = [torch.float32, torch.bfloat16]
needs_tiles = pytest.mark.skipif(amx_problem() is not None, reason=f"no AMX tiles: {amx_problem()}")


@dataclass(frozen=True)
class Case:
    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    columns: Tensor
    outlier_weight: Tensor

    @property
    def mixed(self) -> dict[str, Tensor]:
        return {"outlier_columns_J": self.columns, "outlier_weight_NJ": self.outlier_weight}


def make(rows: int, outputs: int, length: int, dtype: torch.dtype, num_columns: int = 5) -> Case:
    generator = torch.Generator().manual_seed(rows * outputs + length)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    columns = torch.randperm(length, generator=generator)[:num_columns].int()
    x = randn(rows, length)
    x[:, columns] *= 50
    return Case(
        x=x.to(dtype),
        weight=torch.randint(-127, 128, (outputs, length), dtype=torch.int8, generator=generator),
        scale=randn(outputs, 1).abs() / 50,
        bias=randn(outputs).to(dtype),
        columns=columns,
        outlier_weight=randn(num_columns, outputs).bfloat16().t(),
    )


def exact_w8a8(case: Case, *, mixed: bool) -> Tensor:
    """The definition, in float64, from integers that `test_quantize_rows` holds to theirs."""
    x = case.x.clone()
    kept = x[:, case.columns].double() if mixed else x[:, :0].double()
    if mixed:
        x[:, case.columns] = 0
    q, x_scale = quantize_rows_reference(x)
    out = (q.double() @ case.weight.double().T) * x_scale.double() * case.scale.double().T
    return out + kept @ case.outlier_weight[:, : kept.shape[1]].double().T + case.bias.double()


def choose(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rayllm_kernels.int8_linear", "rayllm_kernels.int8_packed"):
        monkeypatch.setattr(sys.modules[module], "int8_limits", lambda: LOOPS[loop])


@pytest.fixture
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make one loop serve every call, and the reference none."""
    name: str = request.param
    choose(name, monkeypatch)
    module = sys.modules["rayllm_kernels.int8_linear"]

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("served by the reference")

    monkeypatch.setattr(module, "w8a8_linear_reference", refuse)
    monkeypatch.setattr(module, "w8a16_linear_reference", refuse)
    return name


ALL_LOOPS = ["packed", "vector", pytest.param("tile", marks=needs_tiles), "torch"]
every_loop = pytest.mark.parametrize("loop", ALL_LOOPS, indirect=True)


@torch.inference_mode()
@every_loop
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "length"), [(96, 576), (32, 64), (320, 1536)])
def test_w8a8(loop: str, dtype: torch.dtype, outputs: int, length: int) -> None:
    for rows, mixed in pairs(
        [1, 2, 5, 16, 17, 33, 65, 130, 515], [False, True]
    ):  # tiles gather the weights from 113 on
        case = make(rows, outputs, length, dtype)
        weight = pack_weight(case.weight, case.x.dtype)
        assert (weight.dim() == 4) == (loop == "packed")
        assert loop != "packed" or torch.equal(unpack_weight(weight), case.weight)
        result = w8a8_linear(case.x, weight, case.scale, case.bias, **(case.mixed if mixed else {}))
        assert result.dtype == dtype
        exact = exact_w8a8(case, mixed=mixed)
        # The integers' sums are exact; float32 rounds what is made of them, bfloat16 the result.
        loss = 2**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(result.double(), exact, rtol=loss, atol=2**-21 * exact.abs().max().item())


@torch.inference_mode()
@every_loop
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "length"), [(96, 576), (32, 64), (320, 1536)])
def test_w8a16(loop: str, dtype: torch.dtype, outputs: int, length: int) -> None:
    for rows in (1, 2, 5, 16, 17, 33, 65):
        case = make(rows, outputs, length, dtype, num_columns=0)
        product = case.x.double() @ (case.weight.double() * case.scale.double()).T
        exact = product + case.bias.double()
        loss = 2**-8 if dtype == torch.bfloat16 else 2**-20
        result = w8a16_linear(case.x, case.weight, case.scale, case.bias)
        # torch rounds the product to the dtype before the scale; the others round once.
        bound = loss * (exact.abs() + (product.abs() if loop == "torch" else 0)) + 2**-18 * product.abs().max()
        assert ((result.double() - exact).abs() <= bound).all()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a8_gives_the_same_bits_by_every_loop(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(40, 64, 576, dtype)
    results = []
    for name in ("packed", "vector", "torch", *(["tile"] if amx_problem() is None else [])):
        choose(name, monkeypatch)
        weight = pack_weight(case.weight, case.x.dtype)
        together = w8a8_linear(case.x, weight, case.scale, case.bias, **case.mixed)
        for i in (0, 15, 16, 39):
            alone = w8a8_linear(case.x[i : i + 1], weight, case.scale, case.bias, **case.mixed)
            assert torch.equal(alone[0], together[i])
        results.append(together)
    assert all(torch.equal(one, results[0]) for one in results)


@torch.inference_mode()
@every_loop
def test_the_number_of_threads_changes_nothing(loop: str) -> None:
    case, threads, results = make(5, 2048, 576, torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    w8a8_linear(case.x, pack_weight(case.weight, case.x.dtype), case.scale),
                    w8a16_linear(case.x, case.weight, case.scale),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for one in results[1:]:
        assert torch.equal(one[0], results[0][0])
        assert torch.equal(one[1], results[0][1])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows(dtype: torch.dtype) -> None:
    x = torch.randn(33, 576).to(dtype)
    x[3] = 0
    x[4] *= 1e-20
    q, scale = quantize_rows(x)
    expected_q, expected_scale = quantize_rows_reference(x)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    assert q.dtype == torch.int8
    assert (q.abs().amax(1)[[0, 1, 2, 4]] == 127).all()
    assert (q[3] == 0).all()
    assert ((q * scale).double() - x.double()).abs().le(0.5001 * scale.double()).all()


def check_slices(case: Case, width: int, *, mixed: bool, loss: float) -> None:
    """Slices of rows under the whole rows' bounds, against integers and scales of the whole rows in float64."""
    rest = case.x.index_fill(1, case.columns.long(), 0) if mixed else case.x
    q, x_scale = quantize_rows_reference(rest)
    bound, found = rest.abs().amax(1, keepdim=True).float(), []
    for first in range(0, case.x.shape[1], width):
        part = slice(first, first + width)
        mine = (case.columns >= first) & (case.columns < first + width)
        columns, outlier_weight = case.columns[mine] - first, case.outlier_weight[:, mine]
        x, weight = case.x[:, part].contiguous(), case.weight[:, part].contiguous()
        exact = (q[:, part].double() @ weight.double().T) * x_scale.double() * case.scale.double().T
        settings: dict[str, Tensor] = {}
        if mixed:
            exact += x[:, columns].double() @ outlier_weight.double().T
            settings = {"outlier_columns_J": columns, "outlier_weight_NJ": outlier_weight}
        weight = pack_weight(weight, x.dtype)
        found.append(row_bounds(x, columns if mixed else None))
        assert torch.equal(found[-1], row_bounds_reference(x, columns if mixed else None))
        result = w8a8_linear(x, weight, case.scale, **settings, row_bound_T1=bound)
        torch.testing.assert_close(result.double(), exact, rtol=loss, atol=2**-21 * exact.abs().max().item())
        own = w8a8_linear(x, weight, case.scale, **settings, row_bound_T1=found[-1])
        assert torch.equal(own, w8a8_linear(x, weight, case.scale, **settings))
    assert torch.equal(torch.cat(found, 1).amax(1, keepdim=True), bound)


@torch.inference_mode()
@every_loop
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_rows_with_the_bounds_of_the_whole(loop: str, dtype: torch.dtype) -> None:
    for rows, mixed in pairs([1, 2, 4, 5, 16, 17, 130, 600], [False, True]):  # the loops take 512 rows at a time
        case = make(rows, 96, 576, dtype)
        check_slices(case, 192, mixed=mixed, loss=2**-8 if dtype == torch.bfloat16 else 1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_slices_that_only_torch_serves(dtype: torch.dtype) -> None:
    for mixed in (False, True):
        case = make(5, 7, 75, dtype)
        check_slices(case, 25, mixed=mixed, loss=1e-6 if dtype == torch.float32 else 2**-8)


@torch.inference_mode()
def test_the_bound_of_a_row_with_nan_or_infinity_elsewhere_spoils_it() -> None:
    case = make(5, 32, 128, torch.float32)
    case.x[1, 5], case.x[2, 6] = torch.nan, torch.inf
    bound = row_bounds(case.x)
    assert torch.equal(bound.isnan().squeeze(1), torch.tensor([False, True, False, False, False]))
    assert torch.equal(bound.isinf().squeeze(1), torch.tensor([False, False, True, False, False]))
    x, weight = case.x[:, 64:].contiguous(), case.weight[:, 64:].contiguous()
    for product in (w8a8_linear, w8a8_linear_reference):
        result = product(x, weight, case.scale, row_bound_T1=bound)
        assert not result[1:3].isfinite().any()
        assert result[[0, 3, 4]].isfinite().all()


@torch.inference_mode()
@every_loop
def test_nan_and_infinity_stay_visible(loop: str) -> None:
    case = make(6, 64, 128, torch.bfloat16)
    case.x[1, 5] = torch.nan
    case.x[2, 6] = torch.inf
    packed = pack_weight(case.weight, case.x.dtype)
    for result in (w8a8_linear(case.x, packed, case.scale), w8a16_linear(case.x, case.weight, case.scale)):
        assert not result[1:3].isfinite().any()
        assert result[[0, 3, 4, 5]].isfinite().all()
    columns = torch.tensor([5], dtype=torch.int32)
    mixed = w8a8_linear(
        case.x, packed, case.scale, outlier_columns_J=columns, outlier_weight_NJ=torch.ones(64, 1).bfloat16()
    )
    assert not mixed[1].isfinite().any()


@torch.inference_mode()
def test_the_largest_sums_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 65536
    weight, x = torch.full((32, length), -127, dtype=torch.int8), torch.ones(5, length)
    for name in ("packed", "vector", "torch", *(["tile"] if amx_problem() is None else [])):
        choose(name, monkeypatch)
        result = w8a8_linear(x, pack_weight(weight, x.dtype), torch.ones(32, 1))
        torch.testing.assert_close(result, torch.full((5, 32), -127.0 * length))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "length"), [(3, 7, 50), (1, 16, 65), (4, 33, 64), (0, 16, 64)])
def test_shapes_that_only_torch_serves(dtype: torch.dtype, rows: int, outputs: int, length: int) -> None:
    case = make(rows, outputs, length, dtype)
    if rows:
        result = w8a8_linear(case.x, case.weight, case.scale, case.bias, **case.mixed).double()
        torch.testing.assert_close(result, exact_w8a8(case, mixed=True), rtol=1e-2, atol=0.5)
    exact = case.x.double() @ (case.weight.double() * case.scale.double()).T + case.bias.double()
    result = w8a16_linear(case.x, case.weight, case.scale, case.bias).double()
    torch.testing.assert_close(result, exact, rtol=1e-2, atol=1e-3)
    assert w8a8_linear(case.x.view(1, rows, length), case.weight, case.scale).shape == (1, rows, outputs)


@torch.inference_mode()
def test_packed_weights_are_served_by_torch_where_the_loops_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("packed", monkeypatch)
    case = make(5, 32, 64, torch.bfloat16)
    packed = pack_weight(case.weight, torch.bfloat16)
    assert packed.dim() == 4
    with torch.inference_mode(False), torch.enable_grad():  # which the loops do not know
        results = [w8a8_linear(case.x, weight, case.scale) for weight in (packed, case.weight)]
    assert torch.equal(*results)
    assert pack_weight(case.weight, torch.float16) is case.weight


def test_limits_name_tiles_only_where_they_run() -> None:
    assert int8_limits().tiles == (amx_problem() is None)


@pytest.mark.slow
def test_on_a_processor_without_integer_dot_products() -> None:
    """numba compiles for the AVX2 of another processor, whose loops this one runs too."""
    target = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "vector or same_bits"]
    done = subprocess.run(command, env=os.environ | target, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "passed" in done.stdout


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "length"), [(1, 96, 576), (3, 24, 192), (17, 48, 640), (40, 33, 64)])
@pytest.mark.parametrize("count", [0, 5])
def test_sums_of_parts_become_what_the_whole_gives(
    rows: int, outputs: int, length: int, count: int, dtype: torch.dtype
) -> None:
    """To the bit, whichever loop the whole runs in."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, length, generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (outputs, length), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, 1, generator=generator) / 100
    bias = torch.randn(outputs, generator=generator).to(dtype)
    columns = torch.randperm(length, generator=generator)[:count].int()
    outlier_weight = torch.randn(count, outputs, generator=generator).bfloat16().t()
    x[:, columns] *= 30
    bound = row_bounds(x, columns)
    q, _ = quantize_rows(x, outlier_columns_J=columns)
    sums = sum(q[:, first::2].int() @ weight[:, first::2].int().T for first in (0, 1))
    for b in (None, bias):
        whole = w8a8_linear(x, weight, scale, b, outlier_columns_J=columns, outlier_weight_NJ=outlier_weight)
        kept = x[:, columns].float()
        joined = w8a8_epilogue(sums, bound, scale, b, kept_TJ=kept, outlier_weight_NJ=outlier_weight, dtype=dtype)
        assert torch.equal(joined, whole)
        joined = w8a8_epilogue_reference(
            sums, bound, scale, b, kept_TJ=kept, outlier_weight_NJ=outlier_weight, dtype=dtype
        )
        torch.testing.assert_close(joined, whole, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
