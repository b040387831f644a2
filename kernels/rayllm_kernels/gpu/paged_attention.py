"""`paged_attention` on CUDA: which tiles serve which shapes, the launch, and the op `rayllm::paged_attention`."""

import functools
from dataclasses import dataclass
from itertools import product

import torch
import triton
from torch import Tensor

from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.paged_attention_kernels import attend_kernel, join_kernel
from rayllm_kernels.gpu.spec import Spec
from rayllm_kernels.gpu.split_work import BLOCK_B, Bounds

MAX_HEAD_DIM = 256
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """`block_m`: rows of a query block (a token's group of heads may ask for more); `tile`: keys at a time.

    A context is split no finer than `min_tiles`; the GPU is given `programs_per_sm` programs for each multiprocessor.
    """

    block_m: int
    tile: int
    num_warps: int
    num_stages: int
    whole_tiles: bool = False
    min_tiles: int = 4
    programs_per_sm: int = 4

    def __str__(self) -> str:
        return f"{self.block_m}x{self.tile} w{self.num_warps} s{self.num_stages} p{self.programs_per_sm}"


def _prefill(block_m: int, tile: int, num_warps: int, num_stages: int) -> Config:
    return Config(
        block_m=block_m,
        tile=tile,
        num_warps=num_warps,
        num_stages=num_stages,
        whole_tiles=True,
        programs_per_sm=2,
    )


def _decode(tile: int, num_stages: int, *, programs_per_sm: int = 4) -> Config:
    return Config(
        block_m=16,
        tile=tile,
        num_warps=4,
        num_stages=num_stages,
        min_tiles=256 // tile,
        programs_per_sm=programs_per_sm,
    )


# By (decode, padded head size): the first is used, the others are for the benchmark to compare. None has run on a GPU;
# the order is by registers, shared memory and bytes in flight. A key's address needs a load of the block table first,
# which takes every second stage: n stages keep (n - 1) / 2 tiles of keys in flight.
CONFIGS: dict[tuple[bool, int], tuple[Config, ...]] = {
    (True, 64): (_decode(128, 5), _decode(64, 7), _decode(64, 5, programs_per_sm=8)),
    (True, 128): (_decode(64, 5), _decode(32, 7), _decode(64, 7)),
    (True, 256): (_decode(32, 5), _decode(32, 7)),
    (False, 64): (_prefill(128, 64, 8, 5), _prefill(128, 128, 8, 5), _prefill(64, 64, 4, 5)),
    (False, 128): (_prefill(128, 64, 8, 5), _prefill(128, 32, 8, 7), _prefill(64, 64, 4, 5)),
    (False, 256): (_prefill(128, 32, 8, 5), _prefill(64, 32, 8, 5), _prefill(64, 16, 4, 5)),
}
# Keys and values of int8 are widened in registers: tiles as above spill some with triton 3.6, and so does the third of
# those for decode.
INT8_PREFILL = {
    64: (_prefill(128, 64, 8, 5), _prefill(64, 64, 4, 5)),
    128: (_prefill(128, 32, 8, 7), _prefill(128, 64, 8, 3)),
    256: (_prefill(128, 16, 8, 7), _prefill(64, 16, 4, 5)),
}
# 32-bit products run on the ordinary cores; it is there for checks, not for speed.
_FLOAT32 = Config(block_m=16, tile=16, num_warps=4, num_stages=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What decides the binary. A decode step's query block is one token: its rows depend on the group alone."""

    config: Config
    kv_heads: int
    group: int
    head_dim: int
    page: int
    window: bool
    int8: bool
    decode: bool

    @property
    def block_m(self) -> int:
        return max(self.config.block_m, int(triton.next_power_of_2(self.group)))

    @property
    def block_q(self) -> int:
        return 1 if self.decode else self.block_m // self.group

    @property
    def rows_joined(self) -> int:
        """Of a query block by one program: one where rows are few, to spread them over the GPU; else more, so that the
        programs without work, which are most of them in prefill, stay few.
        """
        return 1 if self.decode else 8

    def _common(self) -> dict[str, object]:
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_E": max(16, triton.next_power_of_2(self.head_dim)),
            "BLOCK_Q": self.block_q,
            "TILE": self.config.tile,
            "MIN_TILES": self.config.min_tiles,
            "HAS_WINDOW": self.window,
            "BLOCK_B": BLOCK_B,
        }

    def attend_constexprs(self) -> dict[str, object]:
        return self._common() | {
            "PAGE": self.page,
            "BLOCK_M": self.block_m,
            "INT8": self.int8,
            "WHOLE_TILES": self.config.whole_tiles,
        }

    def join_constexprs(self) -> dict[str, object]:
        return self._common() | {"ROWS": self.rows_joined, "SPLITS": 32 // self.rows_joined}


def configs_for(head_dim: int, *, decode: bool, int8: bool) -> tuple[Config, ...]:
    """Those that ship for products of 16 bits, the one in use first."""
    size = max(64, int(triton.next_power_of_2(head_dim)))
    if not int8:
        return CONFIGS[decode, size]
    return CONFIGS[True, size][:2] if decode else INT8_PREFILL[size]


def launch(
    q_THE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    k_scales_NPK: Tensor | None,
    v_scales_NPK: Tensor | None,
    block_tables_RM: Tensor,
    rows_B: Tensor,
    query_start_B1: Tensor,
    context_lens_B: Tensor,
    scale: float,
    window: int | None,
    out_THE: Tensor,
    *,
    processors: int,
    config: Config | None = None,
) -> None:
    """Fill `out_THE` on a GPU of that many multiprocessors; `supports` says for which tensors."""
    tokens, heads, head_dim = q_THE.shape
    _, page, kv_heads, _ = k_cache_NPKE.shape
    sequences, int8 = rows_B.shape[0], k_cache_NPKE.dtype == torch.int8
    if tokens == 0:
        return
    decode = tokens <= sequences
    if config is None:
        wide = q_THE.dtype == torch.float32 or not (int8 or q_THE.dtype == k_cache_NPKE.dtype)
        config = _FLOAT32 if wide else configs_for(head_dim, decode=decode, int8=int8)[0]
    problem = Problem(
        config=config,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        head_dim=head_dim,
        page=page,
        window=window is not None,
        int8=int8,
        decode=decode,
    )
    bounds = Bounds(
        tokens=tokens,
        sequences=sequences,
        max_context=block_tables_RM.shape[1] * page,
        block_q=problem.block_q,
        tile=config.tile,
        min_tiles=config.min_tiles,
        max_items=max(1, processors * config.programs_per_sm // kv_heads),
    )
    rows = problem.block_q * problem.group
    partial_out = q_THE.new_empty((bounds.slots, kv_heads, rows, head_dim), dtype=torch.float32)
    partial_lse = q_THE.new_empty((bounds.slots, kv_heads, rows), dtype=torch.float32)
    limits = (window or 0, sequences, bounds.max_items)
    launch_kernel(
        attend_kernel,
        (bounds.items * kv_heads,),
        q_THE,
        k_cache_NPKE,
        v_cache_NPKE,
        k_scales_NPK,
        v_scales_NPK,
        out_THE,
        partial_out,
        partial_lse,
        block_tables_RM,
        rows_B,
        query_start_B1,
        context_lens_B,
        q_THE.stride(0),
        q_THE.stride(1),
        block_tables_RM.stride(0),
        scale * _LOG2_E,
        *limits,
        **problem.attend_constexprs(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if bounds.split_blocks:
        launch_kernel(
            join_kernel,
            (bounds.split_blocks * kv_heads * triton.cdiv(rows, problem.rows_joined),),
            out_THE,
            partial_out,
            partial_lse,
            query_start_B1,
            context_lens_B,
            *limits,
            **problem.join_constexprs(),
            num_warps=4,
        )


@functools.cache
def _processors(device: torch.device) -> int:
    """Under the interpreter, which runs on CPU, few: every program costs it a millisecond."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@torch.library.custom_op("rayllm::paged_attention", mutates_args=("out_THE",))
def paged_attention(
    q_THE: Tensor,
    k_cache_NPKE: Tensor,
    v_cache_NPKE: Tensor,
    k_scales_NPK: Tensor | None,
    v_scales_NPK: Tensor | None,
    block_tables_RM: Tensor,
    rows_B: Tensor,
    query_start_B1: Tensor,
    context_lens_B: Tensor,
    scale: float,
    window: int | None,
    out_THE: Tensor,
) -> None:
    """`launch` on the GPU of q, for torch.compile and CUDA graphs."""
    launch(
        q_THE,
        k_cache_NPKE,
        v_cache_NPKE,
        k_scales_NPK,
        v_scales_NPK,
        block_tables_RM,
        rows_B,
        query_start_B1,
        context_lens_B,
        scale,
        window,
        out_THE,
        processors=_processors(q_THE.device),
    )


@paged_attention.register_fake
def _(*_arguments: object, **_keywords: object) -> None:
    """Nothing but `out_THE` changes, and no shape depends on data."""


def supports(q: Tensor, out: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor) -> bool:
    """Whether `launch` takes these tensors, the scales and the lengths (int32) aside."""
    return (
        q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and k_cache.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8)
        and k_cache.dtype == v_cache.dtype
        and q.shape[2] <= MAX_HEAD_DIM
        and q.stride(2) == 1
        and out.is_contiguous()
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and tables.dtype == torch.int32
        and tables.stride(1) == 1
    )


def _spec(
    name: str,
    config: Config,
    *,
    decode: bool,
    head_dim: int,
    int8: bool = False,
    window: bool = False,
    dtype: str = "bf16",
    group: int = 4,
) -> Spec:
    """`attend_kernel` for pages of 16 tokens and 8 kv heads, each of which `group` query heads share; q in `dtype`."""
    problem = _shipped(config, decode=decode, head_dim=head_dim, int8=int8, window=window, group=group)
    cache, scales = ("*i8", "*fp32") if int8 else (f"*{dtype}", "constexpr")
    pointers = {
        "q": f"*{dtype}",
        "k_cache": cache,
        "v_cache": cache,
        "k_scales": scales,
        "v_scales": scales,
        "out": f"*{dtype}",
    }
    pointers |= {"partial_out": "*fp32", "partial_lse": "*fp32"}
    pointers |= dict.fromkeys(("tables", "rows", "starts", "contexts"), "*i32")
    strides = ("q_token_stride", "q_head_stride", "table_stride")
    constexprs = problem.attend_constexprs() | ({} if int8 else {"k_scales": None, "v_scales": None})
    scalars = dict.fromkeys((*strides, "window", "num_sequences", "max_items"), "i32") | {"scale": "fp32"}
    return Spec(
        name=f"paged_attention {name}",
        kernel=attend_kernel,
        signature=pointers | scalars | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*(name for name in pointers if name not in constexprs), *strides),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=frozenset() if decode or dtype == "fp32" else frozenset({"wgmma"}),
    )


def _spec_join(config: Config, *, decode: bool, head_dim: int) -> Spec:
    problem = _shipped(config, decode=decode, head_dim=head_dim, int8=False, window=False)
    pointers = {"out": "*bf16", "partial_out": "*fp32", "partial_lse": "*fp32", "starts": "*i32", "contexts": "*i32"}
    constexprs = problem.join_constexprs()
    scalars = dict.fromkeys(("window", "num_sequences", "max_items"), "i32")
    return Spec(
        name=f"paged_attention join {'decode' if decode else 'prefill'} E{head_dim}",
        kernel=join_kernel,
        signature=pointers | scalars | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=tuple(pointers),
        num_warps=4,
        num_stages=3,  # what a launch that names none gets
        expects=frozenset(),
    )


def _shipped(config: Config, *, decode: bool, head_dim: int, int8: bool, window: bool, group: int = 4) -> Problem:
    return Problem(
        config=config,
        kv_heads=8,
        group=group,
        head_dim=head_dim,
        page=16,
        window=window,
        int8=int8,
        decode=decode,
    )


def _specs() -> list[Spec]:
    """Of the configuration in use whatever a model may ask of it; of the others what the benchmark compares."""
    specs = []
    for decode, head_dim in product((True, False), (64, 80, 96, 128, 256)):
        kind = f"{'decode' if decode else 'prefill'} E{head_dim}"
        for int8 in (False, True):
            first, *others = configs_for(head_dim, decode=decode, int8=int8)
            for dtype, window in product(("bf16", "fp16"), (False, True)):
                name = f"{kind}{' int8' if int8 else ''} {dtype}{' window' if window else ''} {first}"
                specs.append(
                    _spec(name, first, decode=decode, head_dim=head_dim, int8=int8, window=window, dtype=dtype)
                )
            for config in others if (decode, head_dim) in CONFIGS else ():
                name = f"{kind}{' int8' if int8 else ''} bf16 {config}"
                specs.append(_spec(name, config, decode=decode, head_dim=head_dim, int8=int8))
        if (decode, head_dim) in CONFIGS:
            first = configs_for(head_dim, decode=decode, int8=False)[0]
            for group in (1, 3):
                name = f"{kind} bf16 group {group} {first}"
                specs.append(_spec(name, first, decode=decode, head_dim=head_dim, group=group))
            specs.append(_spec(f"{kind} fp32", _FLOAT32, decode=decode, head_dim=head_dim, dtype="fp32"))
            specs.append(_spec_join(first, decode=decode, head_dim=head_dim))
    return specs


SPECS = _specs()
