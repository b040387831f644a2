"""Flash attention on a GPU, forward and backward: TFLOP/s of each configuration that ships, and of torch's own.

16384 tokens of 2048 features in each case, as FlashAttention's papers have it: heads and sequences are cut from them.
Backward counts 2.5 times the operations of forward, which is without those that are done twice. `packed` is one batch
of documents of 100 to 4000 tokens in a single call, for which torch gets a call per document.

    python kernels/bench/flash_attention.py --csv flash_attention.csv
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from timing import Figure, Timer, main
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rayllm_kernels.gpu.flash_attention import Pattern, backward, forward
from rayllm_kernels.gpu.flash_attention_configs import BACKWARD_KV, BACKWARD_Q, FORWARD, Tiling

TOKENS, FEATURES, COPIES = 16384, 2048, 2
DOCUMENTS = (4000, 100, 1500, 700, 2600, 300, 3100, 1100, 2000, 984)
BACKENDS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    head_dim: int
    causal: bool
    lengths: tuple[int, ...]
    group: int = 1

    @property
    def name(self) -> str:
        size = "packed" if len(set(self.lengths)) > 1 else f"B{len(self.lengths)} S{self.lengths[0]}"
        return f"{size} H{self.heads}/{self.heads // self.group} E{self.head_dim} {'causal' if self.causal else 'full'}"

    @property
    def heads(self) -> int:
        return FEATURES // self.head_dim

    @property
    def starts(self) -> list[int]:
        return [0, *torch.tensor(self.lengths).cumsum(0).tolist()]

    @property
    def flops(self) -> float:
        """Of forward: two products over the keys that a query sees."""
        scores = sum(n * n / 2 if self.causal else n * n for n in self.lengths)
        return 4 * self.heads * self.head_dim * scores


def equal(head_dim: int, length: int, *, causal: bool = True, group: int = 1) -> Case:
    return Case(head_dim=head_dim, causal=causal, lengths=(length,) * (TOKENS // length), group=group)


QUICK = [equal(128, 8192), Case(head_dim=128, causal=True, lengths=DOCUMENTS, group=4)]
CASES = [
    *(equal(head_dim, length) for head_dim in (64, 128, 256) for length in (512, 2048, 8192, 16384)),
    *(equal(head_dim, 8192, causal=False) for head_dim in (64, 128, 256)),
    *(equal(head_dim, 8192, group=4) for head_dim in (64, 128)),
    equal(96, 8192),
    equal(80, 8192),
    QUICK[1],
]


class Inputs:
    def __init__(self, case: Case) -> None:
        self.case = case
        kv_heads = case.heads // case.group
        tokens = sum(case.lengths)

        def tensors(*heads: int) -> list[Tensor]:
            return [torch.randn(tokens, n, case.head_dim, device="cuda", dtype=torch.bfloat16) for n in heads]

        self.sets = [tensors(case.heads, kv_heads, kv_heads, case.heads) for _ in range(COPIES)]
        starts = torch.tensor(case.starts, dtype=torch.int32, device="cuda")
        self.pattern = Pattern(starts, starts, case.head_dim**-0.5, case.causal, None)

    def forward(self, tile: Tiling) -> list[Call]:
        return [lambda q=q, k=k, v=v: forward(q, k, v, self.pattern, tile) for q, k, v, _ in self.sets]

    def backward(self, kv_tile: Tiling, q_tile: Tiling) -> list[Call]:
        def prepare(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Call:
            out, lse = forward(q, k, v, self.pattern, FORWARD[self.case.head_dim][0])
            return lambda: backward(dout, None, q, k, v, out, lse, self.pattern, kv_tile, q_tile)

        return [prepare(*tensors) for tensors in self.sets]

    def _batched(self, x_THE: Tensor) -> list[Tensor]:
        """[B, H, S, E], one for each length: torch takes sequences of one length at a time."""
        if len(set(self.case.lengths)) == 1:
            return [x_THE.view(len(self.case.lengths), -1, *x_THE.shape[1:]).transpose(1, 2)]
        return [x_THE[start:stop].transpose(0, 1)[None] for start, stop in pairwise(self.case.starts)]

    def _attend(self, backend: SDPBackend, tensors: Sequence[Tensor]) -> list[Tensor]:
        with sdpa_kernel(backend):
            return [
                scaled_dot_product_attention(q, k, v, is_causal=self.case.causal, enable_gqa=self.case.group > 1)
                for q, k, v in zip(*map(self._batched, tensors), strict=True)
            ]

    def torch_forward(self, backend: SDPBackend) -> list[Call]:
        return [lambda tensors=tensors[:3]: self._attend(backend, tensors) for tensors in self.sets]

    def torch_backward(self, backend: SDPBackend) -> list[Call]:
        def prepare(dout: Tensor, *inputs: Tensor) -> Call:
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                outs = self._attend(backend, leaves)
            return lambda: torch.autograd.grad(outs, leaves, self._batched(dout), retain_graph=True)

        return [prepare(dout, q, k, v) for q, k, v, dout in self.sets]


def torchs(timer: Timer, make: Callable[[SDPBackend], list[Call]], *, graph: bool) -> dict[str, float]:
    """Microseconds by name; which serve a shape depends on torch's version."""
    found = {}
    for name, backend in BACKENDS.items():
        try:
            found[name] = timer.median_us(make(backend), graph=graph)
        except RuntimeError as error:  # torch says "No available kernel"
            if "vailable kernel" not in str(error):
                raise
    return found


def fastest(found: dict[str, float]) -> tuple[str | None, float | None]:
    return min(found.items(), key=lambda each: each[1]) if found else (None, None)


def measure(timer: Timer, case: Case) -> Iterator[Figure]:
    """torch's backends in rows of their own; the ratios of ours are to the faster one."""
    inputs = Inputs(case)
    found = torchs(timer, inputs.torch_forward, graph=True)
    for name, us in found.items():
        yield Figure(op="flash_attention", case=case.name, kernel=name, us=us, flops=case.flops)
    name, theirs_us = fastest(found)
    for tile in FORWARD[case.head_dim]:
        yield Figure(
            op="flash_attention",
            case=case.name,
            kernel=str(tile),
            us=timer.median_us(inputs.forward(tile)),
            flops=case.flops,
            baseline=name,
            baseline_us=theirs_us,
        )
    # Neither side in a CUDA graph: torch's gradients come out of its autograd.
    found = torchs(timer, inputs.torch_backward, graph=False)
    for name, us in found.items():
        yield Figure(op="flash_attention bwd", case=case.name, kernel=name, us=us, flops=2.5 * case.flops)
    name, theirs_us = fastest(found)
    (kv_first, *kv_others), (q_first, *q_others) = BACKWARD_KV[case.head_dim], BACKWARD_Q[case.head_dim]
    for kv_tile, q_tile in [
        (kv_first, q_first),
        *((x, q_first) for x in kv_others),
        *((kv_first, x) for x in q_others),
    ]:
        yield Figure(
            op="flash_attention bwd",
            case=case.name,
            kernel=f"{kv_tile}, {q_tile}",
            us=timer.median_us(inputs.backward(kv_tile, q_tile), graph=False),
            flops=2.5 * case.flops,
            baseline=name,
            baseline_us=theirs_us,
        )


def figures(timer: Timer, quick: bool) -> Iterator[Figure]:
    with torch.no_grad():
        for case in QUICK if quick else CASES:
            yield from measure(timer, case)


if __name__ == "__main__":
    main(__doc__, figures, devices=["cuda"])
