"""`paged_attention` on CUDA: which tiles serve which shapes, the launch, and the op `rayllm::paged_attention`."""

import functools
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from rayllm_kernels.gpu.launch import launch_kernel
from rayllm_kernels.gpu.paged_attention_kernels import attend_kernel, join_kernel
from rayllm_kernels.gpu.spec import Spec
from rayllm_kernels.gpu.split_work import BLOCK_B, Bounds

MAX_HEAD_DIM = 256
_DECODE_ROWS, _PREFILL_ROWS = 16, 128  # of a query block: of a token's heads at most, and of several tokens'
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
        block_m=_DECODE_ROWS,
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
    (False, 64): (_prefill(_PREFILL_ROWS, 64, 8, 5), _prefill(_PREFILL_ROWS, 128, 8, 5), _prefill(64, 64, 4, 5)),
    (False, 128): (_prefill(_PREFILL_ROWS, 64, 8, 5), _prefill(_PREFILL_ROWS, 32, 8, 7), _prefill(64, 64, 4, 5)),
    (False, 256): (_prefill(_PREFILL_ROWS, 32, 8, 5), _prefill(64, 32, 8, 5), _prefill(64, 16, 4, 5)),
}
# Keys and values of int8 are widened in registers: tiles as above spill some with triton 3.6, and so does the third of
# those for decode.
INT8_PREFILL = {
    64: (_prefill(_PREFILL_ROWS, 64, 8, 5), _prefill(64, 64, 4, 5)),
    128: (_prefill(_PREFILL_ROWS, 32, 8, 7), _prefill(_PREFILL_ROWS, 64, 8, 3)),
    256: (_prefill(64, 16, 8, 5), _prefill(_PREFILL_ROWS, 16, 8, 3)),
}
# 32-bit products run on the ordinary cores; it is there for checks, not for speed.
_FLOAT32 = Config(block_m=_DECODE_ROWS, tile=16, num_warps=4, num_stages=1)


def _padded(head_dim: int) -> int:
    """Columns of a tile: Triton's are powers of two; narrower ones would be further binaries that no model needs."""
    return max(64, int(triton.next_power_of_2(head_dim)))


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
        return 1 if self.decode else 4

    @property
    def join_warps(self) -> int:
        """By 4 some of the widest heads spill with triton 3.6, by 8 some in decode."""
        return 8 if _padded(self.head_dim) == 256 and not self.decode else 4

    def _common(self) -> dict[str, object]:
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_E": _padded(self.head_dim),
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
    size = _padded(head_dim)
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
    # A group that fills more than the one block of a decode step is served by the larger ones of prefill
    decode = tokens <= sequences and heads // kv_heads <= _DECODE_ROWS
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
            num_warps=problem.join_warps,
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
    """Whether `launch` has binaries for these tensors, the scales and the lengths (int32) aside: a cache is in the
    dtype of q, or int8."""
    group = q.shape[1] // k_cache.shape[2]
    return (
        q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and k_cache.dtype in (q.dtype, torch.int8)
        and k_cache.dtype == v_cache.dtype
        and q.shape[2] <= MAX_HEAD_DIM
        and q.shape[2] % 16 == 0  # heads begin where 16 elements can be read at once
        and group <= (_DECODE_ROWS if q.dtype == torch.float32 else _PREFILL_ROWS)
        and q.stride(2) == 1
        and out.is_contiguous()
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and tables.dtype == torch.int32
        and tables.stride(1) == 1
    )


def _spec(
    config: Config,
    *,
    decode: bool,
    head_dim: int,
    int8: bool = False,
    window: bool = False,
    dtype: str = "bf16",
    **shape: int,
) -> Spec:
    """`attend_kernel`; q in `dtype`."""
    problem = _shipped(config, decode=decode, head_dim=head_dim, int8=int8, window=window, **shape)
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
    constexprs = problem.attend_constexprs() | ({} if int8 else {"k_scales": None, "v_scales": None})
    lengths = dict.fromkeys(("tables", "rows", "starts", "contexts"), "*i32")
    strides = ("q_token_stride", "q_head_stride")
    scalars = dict.fromkeys((*strides, "table_stride", "window", "num_sequences", "max_items"), "i32")
    form = f"{dtype}{' int8' if int8 else ''}{' window' if window else ''}"
    return Spec(
        name=f"paged_attention {_kind(decode, head_dim)} {form}{_named(shape)} {config}",
        kernel=attend_kernel,
        signature=pointers | lengths | scalars | {"scale": "fp32"} | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=(*(name for name in pointers if name not in constexprs), *strides),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=frozenset() if decode or dtype == "fp32" else frozenset({"wgmma"}),
    )


def _spec_join(config: Config, *, decode: bool, head_dim: int, dtype: str, window: bool, **shape: int) -> Spec:
    problem = _shipped(config, decode=decode, head_dim=head_dim, int8=False, window=window, **shape)
    pointers = {"out": f"*{dtype}", "partial_out": "*fp32", "partial_lse": "*fp32"}
    constexprs = problem.join_constexprs()
    scalars = dict.fromkeys(("window", "num_sequences", "max_items"), "i32")
    form = f"{dtype}{' window' if window else ''}"
    return Spec(
        name=f"paged_attention join {_kind(decode, head_dim)} {form}{_named(shape)}",
        kernel=join_kernel,
        signature=pointers | {"starts": "*i32", "contexts": "*i32"} | scalars | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=tuple(pointers),
        num_warps=problem.join_warps,
        num_stages=3,  # what a launch that names none gets
        expects=frozenset(),
    )


def _kind(decode: bool, head_dim: int) -> str:
    return f"{'decode' if decode else 'prefill'} E{head_dim}"


def _named(shape: dict[str, int]) -> str:
    return "".join(f" {name} {value}" for name, value in shape.items())


def _shipped(
    config: Config,
    *,
    decode: bool,
    head_dim: int,
    int8: bool,
    window: bool,
    kv_heads: int = 8,
    group: int = 4,
    page: int = 16,
) -> Problem:
    return Problem(
        config=config,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        page=page,
        window=window,
        int8=int8,
        decode=decode,
    )


# By these numbers addresses and rows are divided; the compiler makes something else of them than of 8, 4 and 16
_SHAPES: tuple[dict[str, Any], ...] = ({"kv_heads": 1, "group": 1, "page": 1}, {"kv_heads": 3, "group": 7, "page": 7})


def _specs() -> list[Spec]:
    """Of the configuration in use whatever a model may ask of it; of the others what the benchmark compares."""
    specs = []
    for decode, head_dim in product((True, False), (48, 64, 80, 128, 192, 256)):
        for int8 in (False, True):
            first, *others = configs_for(head_dim, decode=decode, int8=int8)
            for dtype, window in product(("bf16", "fp16"), (False, True)):
                specs.append(_spec(first, decode=decode, head_dim=head_dim, int8=int8, window=window, dtype=dtype))
            for window in (False, True) if decode else ():  # by the same tiles as prefill
                specs.append(_spec(_FLOAT32, decode=True, head_dim=head_dim, int8=int8, window=window, dtype="fp32"))
            for config in others if (decode, head_dim) in CONFIGS else ():
                specs.append(_spec(config, decode=decode, head_dim=head_dim, int8=int8))
            for shape in _SHAPES if (decode, head_dim) in CONFIGS else ():
                specs.append(_spec(first, decode=decode, head_dim=head_dim, int8=int8, **shape))
        first = configs_for(head_dim, decode=decode, int8=False)[0]
        for dtype, window in product(("bf16", "fp16", "fp32"), (False, True)):
            specs.append(_spec_join(first, decode=decode, head_dim=head_dim, dtype=dtype, window=window))
        for shape in _SHAPES:
            specs.append(_spec_join(first, decode=decode, head_dim=head_dim, dtype="bf16", window=False, **shape))
    return specs


SPECS = _specs()
