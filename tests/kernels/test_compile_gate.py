"""Every binary that a model can ask of the GPU operators is one that the compile gate builds.

The operators run here, on CPU tensors, up to the launch of a kernel, which is recorded instead. Their shapes are those
of models: published ones, their slices on several ranks, and others that the operators take.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import rayllm_kernels as ops
from rayllm_kernels import gpu
from rayllm_kernels.gpu import flash_attention_configs, int8_linear
from rayllm_kernels.gpu import paged_attention as gpu_paged_attention
from tests.kernels.launches import (
    PROCESSORS,
    Launch,
    Recorder,
    binary_of,
    divisors_of,
    held_by_a_thread,
    launch_of,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALVES = DTYPES[:2]
MODULES = [
    "flash_attention",
    "fused_linear_cross_entropy",
    "int8_linear",
    "paged_attention",
    "rms_norm",
    "rms_norm_int8",
    "rotary",
    "rotary_store_kv",
    "silu_mul",
    "store_kv",
]
HEAD_DIMS = [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256]
# Query heads, kv heads and head size of SmolLM2, Llama 2 and 3, Mistral, Qwen2.5, Qwen3 and Gemma, some of them on one
# rank and on several
LAYOUTS = [
    *((9, 3, 64), (3, 1, 64), (15, 5, 64), (32, 32, 64), (14, 2, 64), (7, 1, 64), (32, 8, 64)),
    *((12, 2, 128), (16, 2, 128), (28, 4, 128), (7, 1, 128), (40, 8, 128), (64, 8, 128), (128, 8, 128), (16, 1, 128)),
    *((32, 32, 128), (40, 40, 128), (32, 8, 128), (24, 8, 128), (10, 2, 128), (16, 8, 128)),
    *((8, 1, 256), (16, 16, 256), (32, 32, 80), (32, 1, 128)),
]
WIDTHS = [64, 128, 192, 256, 576, 896, 960, 1024, 1536, 2048, 3072, 3584, 4096, 5120, 6144, 8192]  # of norms
LENGTHS = [128, 512, 576, 1536, 2048, 3072, 4096, 5120, 8192, 14336, 18944, 28672, 53248, 65536]  # of rows made int8


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """An H100 on which nothing runs."""
    for name in MODULES:
        monkeypatch.setattr(sys.modules[f"rayllm_kernels.{name}"], "on_triton", lambda op, x: True)
    monkeypatch.setattr(flash_attention_configs, "_on_sm_90", lambda x: True)
    monkeypatch.setattr(int8_linear, "_multiprocessors", lambda device: PROCESSORS)
    monkeypatch.setattr(gpu_paged_attention, "_processors", lambda device: PROCESSORS)
    return Recorder(monkeypatch)


@pytest.fixture(scope="module")
def gate() -> list[Launch]:
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(gpu.__path__, f"{gpu.__name__}.")]
    return [launch_of(spec) for module in modules for spec in getattr(module, "SPECS", [])]


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def train(outputs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs])


@torch.no_grad()
def run_int8() -> None:
    for dtype, count, length in product(DTYPES, (0, 1, 5, 17, 32, 40, 300), LENGTHS):
        x = zeros(3, length, dtype=dtype)
        columns = torch.arange(min(count, length), dtype=torch.int32) if count else None
        ops.quantize_rows(x, outlier_columns_J=columns)
        ops.quantize_rows(x, ops.row_bounds(x, columns), outlier_columns_J=columns)
    for dtype, rows, outputs, length in product(DTYPES, (1, 17, 64, 300), (96, 97, 4096), (592, 1024)):
        x, weight = zeros(rows, length, dtype=dtype), zeros(outputs, length, dtype=torch.int8)
        scale, bias = zeros(outputs, 1, dtype=torch.float32), zeros(outputs, dtype=dtype)
        for b in (None, bias):
            ops.w8a16_linear(x, weight, scale, b)
            for count in (0, 1, 16, 20, 40):
                columns = torch.arange(count, dtype=torch.int32)
                ops.w8a8_linear(
                    x,
                    weight,
                    scale,
                    b,
                    outlier_columns_J=columns,
                    outlier_weight_NJ=zeros(count, outputs, dtype=torch.bfloat16).t(),
                )


def attend_pages(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    int8: bool = False,
    window: int | None = None,
    page: int = 16,
) -> None:
    """Two sequences."""
    cache = zeros(4, page, kv_heads, head_dim, dtype=torch.int8 if int8 else dtype)
    scales = zeros(4, page, kv_heads, dtype=torch.float32) if int8 else None
    ops.paged_attention(
        zeros(tokens, heads, head_dim, dtype=dtype),
        cache,
        cache,
        block_tables_RM=zeros(2, 3001, dtype=torch.int32),
        rows_B=torch.arange(3, dtype=torch.int32)[1:],
        query_start_B1=torch.tensor([0, 1, tokens], dtype=torch.int32),
        context_lens_B=torch.tensor([30, 30], dtype=torch.int32),
        scale=1.0,
        window=window,
        k_scales_NPK=scales,
        v_scales_NPK=scales,
    )


@torch.no_grad()
def run_pages() -> None:
    for dtype, int8, window, tokens, head_dim in product(DTYPES, (False, True), (None, 8), (2, 9), HEAD_DIMS):
        attend_pages(tokens, 8, 2, head_dim, dtype=dtype, int8=int8, window=window)
    for (heads, kv_heads, head_dim), page, tokens, int8 in product(LAYOUTS, (1, 7, 16, 256), (2, 9), (False, True)):
        attend_pages(tokens, heads, kv_heads, head_dim, dtype=torch.bfloat16, int8=int8, page=page)


def run_flash() -> None:
    starts = torch.tensor([0, 3, 40], dtype=torch.int32)
    for dtype, (causal, window), head_dim in product(HALVES, ((True, None), (True, 8), (False, None)), HEAD_DIMS):
        qkv = zeros(40, 8, head_dim, dtype=dtype).requires_grad_()
        q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
        lengths = {"cu_seqlens_q_B1": starts, "cu_seqlens_k_B1": starts}
        train(ops.flash_attention(q, k, v, **lengths, scale=1.0, causal=causal, window=window), qkv)
        train(ops.flash_attention_with_lse(q, k, v, **lengths, scale=1.0, causal=causal, window=window), qkv)


def run_rows() -> None:
    for dtype, rows, width in product(DTYPES, (1, 16, 33), WIDTHS):
        x, weight = (zeros(*shape, dtype=dtype).requires_grad_() for shape in ((rows, width), (width,)))
        train(ops.rms_norm(x, weight, 1e-5), x, weight)
        train(ops.add_rms_norm(x, x, weight, 1e-5), x, weight)
        train(ops.silu_mul(x, x), x)
        with torch.no_grad():
            ops.rms_norm_int8(x, weight, 1e-5)
            ops.add_rms_norm_int8(x, x, weight, 1e-5)
    for dtype, vocabulary, tokens, ignored in product(DTYPES, (49152, 50257), (1, 3, 1501), (-100, 0, 1)):
        hidden = zeros(tokens, 16, dtype=dtype).requires_grad_()
        targets = zeros(tokens, dtype=torch.int64)
        train(ops.fused_linear_cross_entropy(hidden, zeros(vocabulary, 16, dtype=dtype), targets, ignored), hidden)


def run_heads() -> None:
    for dtype, (heads, kv_heads, head_dim) in product(DTYPES, LAYOUTS):
        qkv = zeros(3, heads + 2 * kv_heads, head_dim, dtype=dtype)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        cos, weight, slots = zeros(3, head_dim, dtype=dtype), zeros(head_dim, dtype=dtype), torch.arange(4)[1:]
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        train(ops.apply_rotary(*leaves, cos, cos), *leaves)
        with torch.no_grad():
            ops.rms_norm(q, weight, 1e-5)
            ops.apply_rotary(q, k, cos, cos)
            for cache_dtype in (*DTYPES, torch.int8):
                caches = [zeros(2, 16, kv_heads, head_dim, dtype=cache_dtype) for _ in range(2)]
                scales = [zeros(2, 16, kv_heads, dtype=torch.float32) for _ in range(2)]
                ops.store_kv(k, v, *caches, slots, *(scales if cache_dtype == torch.int8 else (None, None)))
                if cache_dtype != torch.int8:
                    ops.rotary_store_kv(q, k, v, cos, cos, *caches, slots)


@pytest.mark.parametrize("run", [run_int8, run_pages, run_flash, run_rows, run_heads])
def test_what_is_launched_is_compiled_in_the_gate(
    run: Callable[[], None], recorder: Recorder, gate: list[Launch]
) -> None:
    run()
    compiled: dict[object, int] = {}
    for launch in gate:
        key = binary_of(launch)
        compiled[key] = max(compiled.get(key, 0), held_by_a_thread(launch))
    missing = {
        (name, tuple(sorted(map(str, seen))))
        for launch in recorder.launches
        for name, seen in [binary_of(launch)]
        if compiled.get((name, seen), -1) < held_by_a_thread(launch)
    }
    assert recorder.launches
    assert not missing, "\n".join(map(str, sorted(missing)))
    divisors = set().union(*map(divisors_of, recorder.launches))
    assert divisors <= set().union(*map(divisors_of, gate))
