"""What serves an op: decided once per process, by the machine, and logged with the reason.

On CUDA each op asks `on_triton`; which tensors its kernel takes is the op's own question. On CPU the compiled loops
serve what they take, the linear layer chooses its product by the number of rows, and attention by the number of
queries. `kernels/README.md` has the measurements that the limits are taken from.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm_kernels.amx import amx_problem
from rayllm_kernels.blocks import PANELS_RUN

logger = logging.getLogger(__name__)

_PLAIN = (Tensor, torch.nn.Parameter)  # others may have no memory of their own, or a collective is still to write it


def on_triton(op: str, x: Tensor) -> bool:
    """Whether the Triton kernel of `op` serves tensors on x's device."""
    return x.is_cuda and _has_triton(op)


def _has_triton(op: str) -> bool:
    return _decide(op)


# What torch.compiler.assume_constant_result sets, which imports torch's whole compiler, and triton, to set it.
_has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _decide(op: str) -> bool:
    problem = triton_problem()
    if problem is None:
        logger.info("%s on CUDA: Triton, on %s", op, torch.cuda.get_device_name())
    else:
        logger.warning("%s on CUDA: torch, because %s", op, problem)
    return problem is None


def triton_problem() -> str | None:
    """Why Triton cannot serve CUDA tensors here, None where it can. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'rayllm[gpu]')"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for {'ROCm' if torch.version.hip else 'no GPU'}, not for CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def loops_may_run(x: Tensor) -> bool:
    """Whether compiled CPU loops that have a gradient may serve x: torch.compile cannot look into them."""
    return x.is_cpu and type(x) in _PLAIN and not torch.compiler.is_compiling()


def readable(gradient: Tensor) -> Tensor:
    """Contiguous, for compiled loops; a collective that is under way is waited for."""
    if type(gradient) in _PLAIN:
        return gradient.contiguous()
    return gradient.clone(memory_format=torch.contiguous_format)


def loops_without_gradient_may_run(x: Tensor) -> bool:
    return loops_may_run(x) and not torch.is_grad_enabled()


LONGEST_IN_PLACE = 16  # queries of a sequence that read pages in place on CPU: past that torch's products pay


@functools.cache
def shortest_flash_prompt(device_type: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> int | None:
    """The fewest tokens with which a prompt of which nothing is cached attends by `flash_attention` to its own keys and
    values, and not by `paged_attention` to those in the cache; None: every prompt attends to the cache."""
    shortest = None
    if cache_dtype != dtype:
        why = f"later steps see of it what a cache of {_name(cache_dtype)} holds"
    elif device_type == "cpu":
        shortest, why = LONGEST_IN_PLACE + 1, "shorter ones are faster in place"
    elif dtype == torch.float32:
        why = "the tiles of flash attention are of 16 bits"
    else:
        shortest, why = 2, "it reads no block table and joins no splits; a token alone is a decode step"
    kernel = "paged attention" if shortest is None else f"flash attention from {shortest} tokens on"
    logger.info("a prompt in %s on %s: %s, because %s", _name(dtype), device_type, kernel, why)
    return shortest


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLimits:
    """The most rows of x for which each product is the fastest; above all of them torch's is."""

    vector_float32: int
    vector_bfloat16: int
    tile_bfloat16: int  # 0: no tiles on this machine


@functools.cache
def linear_limits() -> LinearLimits:
    problem = amx_problem()
    if problem is None:
        limits = LinearLimits(vector_float32=16, vector_bfloat16=1, tile_bfloat16=256)
        logger.info("bfloat16 linear: vectors for 1 row, AMX tiles up to 256, torch above")
    else:
        limits = LinearLimits(vector_float32=16, vector_bfloat16=4, tile_bfloat16=0)
        logger.info("bfloat16 linear: vectors up to 4 rows, torch above, because %s", problem)
    return limits


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Limits:
    """The most rows of x for which vectors are the fastest; above them AMX tiles are, or torch without `tiles`.

    `packed`: W8A8 is faster, for any number of rows, with weights that are packed when a model is loaded.
    """

    packed: bool
    tiles: bool
    vector_w8a8: int
    vector_float32: int  # W8A16, by the dtype of x
    vector_bfloat16: int


@functools.cache
def int8_limits() -> Int8Limits:
    problem = amx_problem()
    if problem is None:
        limits = Int8Limits(packed=False, tiles=True, vector_w8a8=4, vector_float32=16, vector_bfloat16=8)
        logger.info("int8 linear: vectors up to 4 rows (8 with bfloat16 activations), AMX tiles above")
    else:
        limits = Int8Limits(packed=PANELS_RUN, tiles=False, vector_w8a8=16, vector_float32=16, vector_bfloat16=8)
        logger.info(
            "int8 linear: %s; vectors up to 16 rows (8 with bfloat16 activations), torch above, because %s",
            "W8A8 weights packed for VNNI" if PANELS_RUN else "no packed weights, because there is no AVX-512 VNNI",
            problem,
        )
    return limits
