"""The small ops of a layer and the loss, against torch: GB/s of what has to be read and written.

torch stands for what a plain module calls: F.rms_norm, F.silu, index_put, F.linear with F.cross_entropy. The loss is
timed with its gradients, as a training step needs them, and on a GPU the memory that it took is told.

    python kernels/bench/fused.py --csv fused.csv
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from timing import Figure, Timer, main
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels import (
    add_rms_norm,
    add_rms_norm_int8,
    add_rms_norm_int8_reference,
    apply_rotary,
    apply_rotary_reference,
    compile_kernels,
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_reference,
    rms_norm,
    rotary_store_kv,
    silu_mul,
    silu_mul_reference,
    store_kv,
    store_kv_reference,
)

PAGE = 16
Op = Callable[..., object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of a layer; `name` is of a model that has it."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


SMALL = Shape(name="SmolLM2-135M", hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536)
LARGE = Shape(name="Llama-3-8B", hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """An op with inputs made by `make`; the bytes that it moves are those of `make`'s tensors and its outputs."""

    op: str
    ours: Op
    theirs: Op
    make: Callable[[], Sequence[Tensor]]
    written: int

    def figures(self, timer: Timer, case: str) -> Iterator[Figure]:
        first = self.make()
        moved = self.written + sum(x.numel() * x.element_size() for x in first)
        sets = [first, *(self.make() for _ in range(timer.copies_from_memory(moved) - 1))]
        theirs_us, ours_us = (
            timer.median_us([lambda inputs=inputs, op=op: op(*inputs) for inputs in sets])
            for op in (self.theirs, self.ours)
        )
        yield Figure(
            op=self.op, case=case, kernel="ours", us=ours_us, moved=moved, baseline="torch", baseline_us=theirs_us
        )


def comparisons(shape: Shape, tokens: int, device: str) -> Iterator[Comparison]:
    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device).bfloat16()

    hidden, heads, kv_heads, head_dim = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim
    weight, row = randn(hidden), 2 * tokens * hidden
    yield Comparison(
        op="rms_norm",
        ours=lambda x: rms_norm(x, weight, 1e-5),
        theirs=lambda x: F.rms_norm(x, (hidden,), weight, 1e-5),
        make=lambda: [randn(tokens, hidden)],
        written=row,
    )
    yield Comparison(
        op="add_rms_norm",
        ours=lambda x, residual: add_rms_norm(x, residual, weight, 1e-5),
        theirs=lambda x, residual: F.rms_norm(x + residual, (hidden,), weight, 1e-5),
        make=lambda: [randn(tokens, hidden), randn(tokens, hidden)],
        written=2 * row,
    )
    yield Comparison(
        op="add_rms_norm_int8",
        ours=lambda x, residual: add_rms_norm_int8(x, residual, weight, 1e-5),
        theirs=lambda x, residual: add_rms_norm_int8_reference(x, residual, weight, 1e-5),
        make=lambda: [randn(tokens, hidden), randn(tokens, hidden)],
        written=row + row // 2,
    )
    yield Comparison(
        op="silu_mul",
        ours=silu_mul,
        theirs=silu_mul_reference,
        make=lambda: randn(tokens, 2 * shape.ffn).chunk(2, dim=1),
        written=2 * tokens * shape.ffn,
    )
    angles = torch.randn(tokens, head_dim // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    pages = -(-tokens // PAGE)
    caches = [torch.zeros(pages, PAGE, kv_heads, head_dim, device=device).bfloat16() for _ in range(2)]
    slots = torch.randperm(pages * PAGE, device=device)[:tokens]

    def qkv() -> Sequence[Tensor]:
        return randn(tokens, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), dim=1)

    def rotate_and_store(q: Tensor, k: Tensor, v: Tensor) -> None:
        q, k = apply_rotary_reference(q, k, cos, sin)
        store_kv_reference(k, v, *caches, slots)

    yield Comparison(
        op="rotary",
        ours=lambda q, k: apply_rotary(q, k, cos, sin),
        theirs=lambda q, k: apply_rotary_reference(q, k, cos, sin),
        make=lambda: qkv()[:2],
        written=2 * tokens * (heads + kv_heads) * head_dim,
    )
    yield Comparison(
        op="store_kv",
        ours=lambda k, v: store_kv(k, v, *caches, slots),
        theirs=lambda k, v: store_kv_reference(k, v, *caches, slots),
        make=lambda: qkv()[1:],
        written=4 * tokens * kv_heads * head_dim,
    )
    yield Comparison(
        op="rotary_store_kv",
        ours=lambda q, k, v: rotary_store_kv(q, k, v, cos, sin, *caches, slots),
        theirs=rotate_and_store,
        make=qkv,
        written=2 * tokens * (heads + 2 * kv_heads) * head_dim,
    )


def loss_figures(timer: Timer, tokens: int, hidden: int, vocabulary: int) -> Iterator[Figure]:
    """Forward and backward: three products of [tokens, hidden] and [vocabulary, hidden]."""
    case = f"T{tokens} D{hidden} V{vocabulary} bf16"
    weight = (torch.randn(vocabulary, hidden, device=timer.device) * 0.02).bfloat16().requires_grad_()
    x = torch.randn(tokens, hidden, device=timer.device).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=timer.device)
    flops = 6 * tokens * hidden * vocabulary

    def measure(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[float, str]:
        def step() -> None:
            torch.autograd.grad(loss(x, weight, targets), (x, weight))

        memory = ""
        if timer.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            memory = f", {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"
        return timer.median_us([step], graph=False), memory

    theirs_us, theirs_memory = measure(fused_linear_cross_entropy_reference)
    ours_us, ours_memory = measure(fused_linear_cross_entropy)
    yield Figure(op="cross_entropy", case=case, kernel=f"torch{theirs_memory}", us=theirs_us, flops=flops)
    yield Figure(
        op="cross_entropy",
        case=case,
        kernel=f"ours{ours_memory}",
        us=ours_us,
        flops=flops,
        baseline="torch",
        baseline_us=theirs_us,
    )


def figures(timer: Timer, quick: bool) -> Iterator[Figure]:
    cuda = timer.device == "cuda"
    if not cuda:
        compile_kernels()
    with torch.no_grad():
        for shape in (LARGE,) if cuda and quick else (SMALL, LARGE) if cuda else (SMALL,):
            for tokens in (1, 64, 8192) if cuda else (1, 16, 512):
                for comparison in comparisons(shape, tokens, timer.device):
                    yield from comparison.figures(timer, f"T{tokens} {shape.name} bf16")
    losses = [(16384, 4096, 128256)] if cuda else [(64, 576, 49152)]
    if cuda and not quick:
        losses.append((32768, 2048, 49152))
    for tokens, hidden, vocabulary in losses:
        yield from loss_figures(timer, tokens, hidden, vocabulary)


if __name__ == "__main__":
    main(__doc__, figures)
