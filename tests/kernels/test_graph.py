"""A replay against the function that was recorded: the same bits for other inputs, and nothing recorded that it cannot
repeat."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from rayllm_kernels import add_rms_norm, linear, native, rms_norm, silu_mul
from rayllm_kernels.dispatch import linear_limits
from rayllm_kernels.graph import NotCapturableError, Workspace, capture

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def layers(x_TD: Tensor, count: int) -> Callable[[], Tensor]:
    """A stack of norms, products and gates on `x_TD`, as a decoder has them."""
    generator = torch.Generator().manual_seed(count)
    size = x_TD.shape[1]
    weights = [
        [
            (torch.randn(shape, generator=generator) / 8).to(x_TD.dtype)
            for shape in ((2 * 96, size), (size, 96), (size,))
        ]
        for _ in range(count)
    ]

    def run() -> Tensor:
        x, residual = rms_norm(x_TD, weights[0][2], 1e-5), x_TD
        for up, down, norm in weights:
            gate, value = linear(x, up).chunk(2, dim=-1)
            x, residual = add_rms_norm(linear(silu_mul(gate, value), down), residual, norm, 1e-5)
        return x

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_a_replay_computes_the_same_from_new_inputs(tokens: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and tokens > max(linear_limits().vector_bfloat16, linear_limits().tile_bfloat16):
        pytest.skip(f"without AMX tiles, torch multiplies {tokens} rows")
    x = torch.randn(tokens, 64).to(dtype)
    run = layers(x, 3)
    graph = capture(run, Workspace())
    assert torch.equal(graph.output, run())
    for _ in range(3):
        x.copy_(torch.randn(tokens, 64))
        assert torch.equal(graph.replay(), run())


def test_graphs_of_one_workspace_take_turns() -> None:
    workspace = Workspace()
    inputs = [torch.randn(tokens, 64) for tokens in (1, 5, 3)]
    runs = [layers(x, 2) for x in inputs]
    graphs = [capture(run, workspace) for run in runs]
    for _ in range(2):
        for x, run, graph in zip(inputs, runs, graphs, strict=True):
            x.copy_(torch.randn(x.shape))
            assert torch.equal(graph.replay(), run())


def test_memory_does_not_grow_with_the_number_of_layers() -> None:
    sizes = []
    for count in (2, 20):
        workspace = Workspace()
        capture(layers(torch.randn(4, 64), count), workspace)
        sizes.append(workspace.nbytes)
    assert sizes[0] == sizes[1]


def test_one_thread_and_two_give_the_same() -> None:
    x = torch.randn(16, 64)
    run, threads = layers(x, 2), torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outputs.append(capture(run, Workspace()).replay().clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs)


def test_what_torch_computes_is_refused_by_name() -> None:
    x, weight = torch.randn(2, 64), torch.randn(8, 64)
    with pytest.raises(NotCapturableError, match=r"aten\.mul"):
        capture(lambda: linear(x * 2, weight), Workspace())
    narrow, odd = torch.randn(2, 50), torch.randn(8, 50)
    with pytest.raises(NotCapturableError, match=r"aten\.(mm|linear|addmm)"):  # no kernel for so odd a shape
        capture(lambda: linear(narrow, odd), Workspace())


def test_an_error_ends_the_recording() -> None:
    def fails() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        capture(fails, Workspace())
    x = torch.randn(2, 64)
    assert len(capture(layers(x, 1), Workspace())) == 5
    assert native.empty((2, 3), x).dtype == x.dtype


def test_other_threads_are_not_recorded() -> None:
    mine, theirs = layers(torch.randn(2, 64), 1), torch.inference_mode()(layers(torch.randn(2, 64), 4))

    def run() -> Tensor:
        other = threading.Thread(target=theirs)
        other.start()
        other.join()
        return mine()

    assert len(capture(run, Workspace())) == 5
