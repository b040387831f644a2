"""Which product serves a linear layer on CPU: decided once per process, by the machine, and logged with the reason.

The limits were measured with `kernels/bench/cpu_decode.py`; its table is in `kernels/README.md`.
"""

import functools
import logging
from dataclasses import dataclass

from rayllm_kernels.amx import amx_problem

logger = logging.getLogger(__name__)


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
    """The most rows of x for which vectors are the fastest; above them AMX tiles are, or torch without `tiles`."""

    tiles: bool
    vector_w8a8: int
    vector_float32: int  # W8A16, by the dtype of x
    vector_bfloat16: int


@functools.cache
def int8_limits() -> Int8Limits:
    problem = amx_problem()
    if problem is None:
        limits = Int8Limits(tiles=True, vector_w8a8=4, vector_float32=16, vector_bfloat16=8)
        logger.info("int8 linear: vectors up to 4 rows (8 with bfloat16 activations), AMX tiles above")
    else:
        limits = Int8Limits(tiles=False, vector_w8a8=16, vector_float32=16, vector_bfloat16=8)
        logger.info(
            "int8 linear: vectors up to 16 rows (8 with bfloat16 activations), torch above, because %s", problem
        )
    return limits
