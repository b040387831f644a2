"""Attention as the decoder sees it, and its dense form for training and tests.

The decoder computes q, k and v of a step's tokens, all sequences flat, and asks its context to attend; when they are
rotated and where keys of earlier steps are kept is the context's business alone. Letters: T tokens of the step,
S tokens of one sequence, H query heads, K kv heads, E head_dim.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from rayllm.models.rope import Rotation
from rayllm_kernels import flash_attention


class ForwardContext(Protocol):
    @property
    def rope_lengths_T(self) -> Tensor | None:
        """[T] integers, for dynamic rope scaling only: the length that a token's angles are computed for.

        max(length of the prompt, position + 1): what transformers uses for a prompt, and then for each cached step.
        None: no scaling.
        """

    def attend(
        self,
        layer: int,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        rotation: Rotation | None,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """-> [T, H, E]. Causal within each sequence. Query head h reads kv head h // (H / K).

        `layer` counts over the whole model. `rotation` is yet to be applied to q and k (None: learned positions).
        `window`: keys that a query sees, itself included (None: all before it).
        """


class DenseContext:
    """Whole sequences packed one after another: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1], and sees no
    other. cu_seqlens begins with 0 and ends with T; a batch's padding is one more sequence, whose results mean nothing.

    Differentiable, keeps nothing between calls.
    """

    def __init__(self, cu_seqlens: Sequence[int]) -> None:
        lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
        if not lengths or cu_seqlens[0] != 0 or min(lengths) < 0:
            raise ValueError(f"cu_seqlens must be 0 and then where each sequence ends, ascending; got {[*cu_seqlens]}")
        lengths_B = torch.tensor(lengths)
        self._lengths_T = lengths_B.repeat_interleave(lengths_B)
        self._positions_T = torch.cat([torch.arange(length) for length in lengths])
        self._cu_seqlens_B1 = torch.tensor(cu_seqlens, dtype=torch.int32)

    @property
    def positions_T(self) -> Tensor:
        """[T] int64 on CPU: where each token stands in its sequence, for the decoder."""
        return self._positions_T

    @property
    def rope_lengths_T(self) -> Tensor | None:
        return self._lengths_T

    def attend(
        self,
        layer: int,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        rotation: Rotation | None,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        if rotation is not None:
            q_THE, k_TKE = rotation.apply(q_THE, k_TKE)
        if q_THE.shape[0] != len(self._positions_T):
            raise ValueError(f"{q_THE.shape[0]} tokens came to a context of {len(self._positions_T)}")
        if self._cu_seqlens_B1.device != q_THE.device:  # one copy, not one for each layer
            self._cu_seqlens_B1 = self._cu_seqlens_B1.to(q_THE.device)
        return flash_attention(
            q_THE,
            k_TKE,
            v_TKE,
            cu_seqlens_q_B1=self._cu_seqlens_B1,
            cu_seqlens_k_B1=self._cu_seqlens_B1,
            scale=scale,
            window=window,
        )
