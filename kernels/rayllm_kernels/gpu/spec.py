"""One shipped configuration of a Triton kernel, as the compile gate builds it without a GPU."""

from dataclasses import dataclass

from triton.runtime import JITFunction


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """`signature`: argument to Triton type; `aligned`: arguments divisible by 16; `expects`: any of "wgmma", "igmma",
    "tma", "setmaxnreg", which the compiled code has to contain."""

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    expects: frozenset[str]
