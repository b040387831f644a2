"""Attention over pages on a GPU: decode in GB/s of keys and values read, prefill in TFLOP/s, both against torch.

Every case runs with each configuration that ships for it. torch decodes by gathering the pages and one call of its
attention, which is what it offers; for prefill it gets the keys and values already gathered.

    python kernels/bench/paged_attention.py --csv paged_attention.csv
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timing import Figure, Timer, main
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rayllm_kernels.gpu.paged_attention import Config, configs_for, launch

HEADS, KV_HEADS, PAGE, CACHES = 32, 8, 16, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    batch: int
    queries: int  # of each sequence
    context: int
    head_dim: int
    int8: bool

    @property
    def decode(self) -> bool:
        return self.queries == 1

    @property
    def name(self) -> str:
        return f"B{self.batch} Q{self.queries} S{self.context} E{self.head_dim} {'int8' if self.int8 else 'bf16'}"

    @property
    def moved(self) -> float:
        per_head = self.head_dim + 4 if self.int8 else 2 * self.head_dim
        return 2 * self.batch * self.context * KV_HEADS * per_head

    @property
    def flops(self) -> float:
        """Two products over the keys that a query sees."""
        seen = self.queries * (self.context - self.queries) + self.queries * (self.queries + 1) / 2
        return 4 * self.batch * HEADS * self.head_dim * seen


CASES = [
    Case(batch=batch, queries=1, context=context, head_dim=head_dim, int8=int8)
    for head_dim in (64, 128, 256)
    for batch, context in ((1, 8192), (12, 8192), (16, 8192), (64, 8192), (64, 512), (1, 131072))
    for int8 in (False, True)
] + [
    Case(batch=batch, queries=queries, context=context, head_dim=head_dim, int8=int8)
    for head_dim in (64, 128, 256)
    for batch, queries, context in ((1, 8192, 8192), (1, 2048, 16384), (8, 512, 512))
    for int8 in (False, True)
]


class Inputs:
    """Caches in random order of pages, `CACHES` sets of them to take turns."""

    def __init__(self, case: Case) -> None:
        pages = case.batch * -(-case.context // PAGE)
        shape = (pages, PAGE, KV_HEADS, case.head_dim)

        def cache() -> Tensor:
            x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            return (x * 30).clamp(-127, 127).to(torch.int8) if case.int8 else x

        def scales() -> Tensor | None:
            return torch.full(shape[:3], 1 / 30, device="cuda") if case.int8 else None

        self.caches = [(cache(), cache(), scales(), scales()) for _ in range(CACHES)]
        self.q = torch.randn(case.batch * case.queries, HEADS, case.head_dim, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.tables = torch.randperm(pages, device="cuda").view(case.batch, -1).int()
        self.rows = torch.arange(case.batch, device="cuda").int()
        self.starts = torch.arange(case.batch + 1, device="cuda").int() * case.queries
        self.contexts = torch.full_like(self.rows, case.context)
        self.case = case
        self.processors = torch.cuda.get_device_properties(0).multi_processor_count

    def ours(self, which: int, config: Config) -> None:
        launch(
            self.q,
            *self.caches[which],
            self.tables,
            self.rows,
            self.starts,
            self.contexts,
            self.case.head_dim**-0.5,
            None,
            self.out,
            processors=self.processors,
            config=config,
        )

    def theirs(self) -> list[Callable[[], object]]:
        """For bfloat16 caches, one for each set of them."""
        shape = (self.case.batch, self.case.queries, HEADS, self.case.head_dim)
        q = self.q.view(shape).transpose(1, 2)
        tables = self.tables.long()

        def gather(cache: Tensor) -> Tensor:
            return cache[tables].flatten(1, 2)[:, : self.case.context].transpose(1, 2)

        mask = torch.ones(self.case.queries, self.case.context, device="cuda", dtype=torch.bool)
        mask = mask.tril(self.case.context - self.case.queries)
        causal = self.case.queries == self.case.context

        def attend(k: Tensor, v: Tensor) -> Tensor:
            if self.case.decode or causal:
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        if self.case.decode:
            return [lambda k=k, v=v: attend(gather(k), gather(v)) for k, v, _, _ in self.caches]
        gathered = [(gather(k).contiguous(), gather(v).contiguous()) for k, v, _, _ in self.caches]
        return [lambda k=k, v=v: attend(k, v) for k, v in gathered]


def measure(timer: Timer, case: Case) -> Iterator[Figure]:
    inputs = Inputs(case)
    theirs_us = None if case.int8 else timer.median_us(inputs.theirs())
    for config in configs_for(case.head_dim, decode=case.decode, int8=case.int8):
        yield Figure(
            op="paged_attention",
            case=case.name,
            kernel=str(config),
            us=timer.median_us([lambda i=i, config=config: inputs.ours(i, config) for i in range(CACHES)]),
            moved=case.moved,
            flops=case.flops,
            baseline=None if case.int8 else "torch, pages gathered" if case.decode else "torch",
            baseline_us=theirs_us,
        )


def figures(timer: Timer, quick: bool) -> Iterator[Figure]:
    with torch.inference_mode():
        for case in CASES:
            if not quick or case.head_dim == 128:
                yield from measure(timer, case)


if __name__ == "__main__":
    main(__doc__, figures, devices=["cuda"])
