"""Running compiled kernels: every task once, from any thread, beside torch's own threads, with or without a cache."""

import logging
import threading

import pytest
import torch

from rayllm_kernels import compile_kernels, native, rms_norm, rms_norm_reference
from rayllm_kernels.native import Kernel, integer, next_task, real
from rayllm_kernels.simd import LANES, exp, load, load_bf16, store, store_bf16, store_f32, transpose


def _count(block: int) -> None:
    """Kernel: task i adds its share to out[i]."""
    out = integer(block, 0)
    task = next_task(block)
    while task >= 0:
        store_f32(out + 4 * task, task * real(block, 1))
        task = next_task(block)


def _apply(block: int) -> None:
    """Kernel: e**x, and x through bfloat16."""
    x, powers, rounded, transposed = integer(block, 0), integer(block, 1), integer(block, 2), integer(block, 3)
    task = next_task(block)
    while task >= 0:
        values = load(x + 64 * task)
        store(powers + 64 * task, exp(values))
        store_bf16(rounded + 32 * task, values)
        store(x + 64 * task, load_bf16(rounded + 32 * task))
        task = next_task(block)
    transpose(powers, 64, 11, x, transposed)


_count_kernel = Kernel(_count, integers=1, reals=1)
_apply_kernel = Kernel(_apply, integers=4)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tasks", [0, 1, 2, 1000])
def test_every_task_runs_once(tasks: int, threads: int) -> None:
    before, out = torch.get_num_threads(), torch.full((1000,), -1.0)
    try:
        torch.set_num_threads(threads)
        _count_kernel(tasks, out.data_ptr(), 0.5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out[:tasks], torch.arange(tasks) * 0.5)
    assert (out[tasks:] == -1).all()


def test_vector_operations() -> None:
    x = torch.cat(
        (torch.linspace(-87, 88, 1000), torch.tensor([-1e4, 0.0, -0.0, 89, 1e-40, torch.nan, torch.inf, -88]))
    )
    original, powers, rounded = x.clone(), torch.empty_like(x), torch.empty(x.shape, dtype=torch.bfloat16)
    transposed = torch.empty(LANES, LANES)
    _apply_kernel(x.numel() // LANES, x.data_ptr(), powers.data_ptr(), rounded.data_ptr(), transposed.data_ptr())
    torch.testing.assert_close(powers[:1000].double(), original[:1000].double().exp(), rtol=3e-7, atol=0)
    assert powers[1000:].tolist()[:5] == [0.0, 1.0, 1.0, torch.inf, 1.0]
    assert powers[1005].isnan()
    assert powers[1006:].tolist() == [torch.inf, 0.0]
    assert torch.equal(rounded.view(torch.int16)[:-3], original.bfloat16().view(torch.int16)[:-3])
    assert torch.equal(x.nan_to_num(7), rounded.float().nan_to_num(7))
    expected = torch.cat((powers[:176].view(11, LANES), x[:LANES].expand(5, LANES)))
    assert torch.equal(transposed, expected.T)


def test_from_many_threads_at_once_and_beside_torch() -> None:
    x, weight = torch.randn(64, 576), torch.randn(576)
    expected = rms_norm_reference(x, weight, 1e-5)
    wrong: list[int] = []

    def work() -> None:
        with torch.inference_mode():
            for i in range(100):
                if not torch.allclose(rms_norm(x, weight, 1e-5), expected, atol=1e-5):
                    wrong.append(i)
                x @ x.T

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_all_kernels_compile_ahead_of_the_first_request() -> None:
    compile_kernels()
    assert compile_kernels() < 0.1


def test_without_a_writable_cache_it_compiles_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from numba.core.caching import CodeLibraryCacheImpl, CompileResultCacheImpl

    for cache in (CodeLibraryCacheImpl, CompileResultCacheImpl):
        monkeypatch.setattr(cache, "_locator_classes", [])
    kernel, out = Kernel(_count, integers=1, reals=1), torch.zeros(3)
    try:
        with caplog.at_level(logging.WARNING):
            kernel(3, out.data_ptr(), 2.0)
    finally:
        native._REGISTRY.remove(kernel)
    assert out.tolist() == [0.0, 2.0, 4.0]
    assert "no locator available" in caplog.text


def test_one_thread_serves_where_torch_brings_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_parallel", None)
    out = torch.zeros(50)
    _count_kernel(50, out.data_ptr(), 1.0)
    assert torch.equal(out, torch.arange(50.0))
