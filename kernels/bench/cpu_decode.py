"""Every op of a decode step of SmolLM2-135M on CPU, torch against ours: microseconds per call, and the step's sum.

Weights and caches of all 30 layers are walked in order, so nothing is in cache that would not be in a real step. torch
stands for what a plain module would call: F.linear, F.rms_norm, gather and scaled_dot_product_attention.

    OMP_NUM_THREADS=2 python kernels/bench/cpu_decode.py
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timing import Figure, Timer, main
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels import (
    add_rms_norm,
    add_rms_norm_reference,
    apply_rotary,
    apply_rotary_reference,
    compile_kernels,
    linear,
    linear_reference,
    paged_attention,
    silu_mul,
    silu_mul_reference,
    store_kv,
    store_kv_reference,
)

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, PAGE = 30, 576, 9, 3, 64, 1536, 49152, 16
CONTEXT = 160
SHAPES = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One op of layer i in both forms, and how often a layer calls it (0: once a step)."""

    name: str
    per_layer: int
    theirs: Callable[[int], object]
    ours: Callable[[int], object]


def gathered_attention(q_BHE: Tensor, k_cache: Tensor, v_cache: Tensor, blocks_BM: Tensor, context: int) -> Tensor:
    """Decode attention as torch alone does it, for sequences of one length: gather all pages, one SDPA."""
    k, v = (c[blocks_BM].flatten(1, 2)[:, :context].transpose(1, 2) for c in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q_BHE.float().unsqueeze(2), k, v, enable_gqa=True).to(q_BHE.dtype)


def make_ops(batch: int, context: int, dtype: torch.dtype) -> list[Op]:
    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).mul_(0.05).to(dtype)

    weights = {name: [randn(*shape) for _ in range(LAYERS)] for name, shape in SHAPES.items()}
    head, norm = randn(VOCAB, HIDDEN), randn(HIDDEN)
    x, ffn, heads = randn(batch, HIDDEN), randn(batch, FFN), randn(batch, HEADS, HEAD_DIM)
    inputs = {"qkv": x, "o": x, "gate_up": x, "down": ffn}
    qkv, gate_up = randn(batch, HEADS + 2 * KV_HEADS, HEAD_DIM), randn(batch, 2 * FFN)
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    angles = randn(batch, HEAD_DIM)
    gate, up = gate_up.chunk(2, dim=1)
    pages = -(-context // PAGE)
    blocks = torch.randperm(batch * pages).view(batch, pages)
    caches = [
        [randn(batch * pages, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.float32) for _ in range(2)] for _ in range(LAYERS)
    ]
    slots = blocks[:, -1] * PAGE
    tables, rows, starts = blocks.int(), torch.arange(batch).int(), torch.arange(batch + 1).int()
    contexts = torch.full((batch,), context, dtype=torch.int32)

    def attend(i: int) -> Tensor:
        return paged_attention(
            heads,
            caches[i][0],
            caches[i][1],
            block_tables_RM=tables,
            rows_B=rows,
            query_start_B1=starts,
            context_lens_B=contexts,
            scale=HEAD_DIM**-0.5,
            window=None,
        )

    products = [
        Op(
            name=f"linear {name} {SHAPES[name]}",
            per_layer=1,
            theirs=lambda i, name=name: linear_reference(inputs[name], weights[name][i]),
            ours=lambda i, name=name: linear(inputs[name], weights[name][i]),
        )
        for name in SHAPES
    ]
    return [
        *products,
        Op(
            name=f"linear head {(VOCAB, HIDDEN)}",
            per_layer=0,
            theirs=lambda _: linear_reference(x, head),
            ours=lambda _: linear(x, head),
        ),
        Op(
            name="paged attention",
            per_layer=1,
            theirs=lambda i: gathered_attention(heads, *caches[i], blocks, context),
            ours=attend,
        ),
        Op(
            name="store kv",
            per_layer=1,
            theirs=lambda i: store_kv_reference(k, v, *caches[i], slots),
            ours=lambda i: store_kv(k, v, *caches[i], slots),
        ),
        Op(
            name="add + rms norm",
            per_layer=2,
            theirs=lambda _: add_rms_norm_reference(x, x, norm, 1e-5),
            ours=lambda _: add_rms_norm(x, x, norm, 1e-5),
        ),
        Op(
            name="rotary",
            per_layer=1,
            theirs=lambda _: apply_rotary_reference(q, k, angles, angles),
            ours=lambda _: apply_rotary(q, k, angles, angles),
        ),
        Op(
            name="silu * up",
            per_layer=1,
            theirs=lambda _: silu_mul_reference(gate, up),
            ours=lambda _: silu_mul(gate, up),
        ),
    ]


def walk(ops: list[Op], form: str, repeats: int) -> dict[str, float]:
    """Run whole steps in order -> median microseconds of one call of each op."""
    times: dict[str, list[float]] = {op.name: [] for op in ops}
    for _ in range(repeats):
        for i in range(LAYERS + 1):
            for op in ops:
                if (op.per_layer == 0) != (i == LAYERS):
                    continue
                call = getattr(op, form)
                for _ in range(op.per_layer or 1):
                    begin = time.perf_counter()
                    call(i)
                    times[op.name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def figures(timer: Timer, quick: bool) -> Iterator[Figure]:
    """The last one of a batch is the step: its layers' ops and the head, in sum."""
    compile_kernels()
    repeats = timer.repeats if quick else 3 * timer.repeats
    with torch.inference_mode():
        for batch in (1, 16):
            ops = make_ops(batch, CONTEXT, torch.bfloat16)
            theirs, ours = (walk(ops, form, repeats) for form in ("theirs", "ours"))
            case = f"B{batch} S{CONTEXT} SmolLM2-135M bf16"
            sums = [sum(us[op.name] * (op.per_layer * LAYERS or 1) for op in ops) for us in (theirs, ours)]
            rows = [(op.name, theirs[op.name], ours[op.name]) for op in ops]
            for name, theirs_us, ours_us in [*rows, (f"{LAYERS} layers and head", *sums)]:
                yield Figure(
                    op="cpu_decode", case=case, kernel=name, us=ours_us, baseline="torch", baseline_us=theirs_us
                )


if __name__ == "__main__":
    main(__doc__, figures, devices=["cpu"])
