"""Attention as the decoder sees it, and its dense form for training and tests.

The decoder computes q, k and v of a step's tokens, all sequences flat, and asks its context to attend; when they are
rotated and where keys of earlier steps are kept is the context's business alone. Letters: T tokens of the step,
S tokens of one sequence, H query heads, K kv heads, E head_dim.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
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

    `prefixes`: of each sequence, how many of the first tokens of the sequence before it come before its own, so that
    both see them and they are computed once. A sequence lends tokens or borrows some, not both. (): none does.

    Differentiable, keeps nothing between calls.
    """

    def __init__(self, cu_seqlens: Sequence[int], prefixes: Sequence[int] = ()) -> None:
        lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
        if not lengths or cu_seqlens[0] != 0 or min(lengths) < 0:
            raise ValueError(f"cu_seqlens must be 0 and then where each sequence ends, ascending; got {[*cu_seqlens]}")
        prefixes = prefixes or [0] * len(lengths)
        whole = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
        self._lengths_T = torch.tensor(_rope_lengths(whole, prefixes)).repeat_interleave(torch.tensor(lengths))
        self._positions_T = torch.cat([torch.arange(*bounds) for bounds in zip(prefixes, whole, strict=True)])
        self._q_starts_B1 = torch.tensor(cu_seqlens, dtype=torch.int32)
        self._k_starts_B1 = torch.tensor([0, *accumulate(whole)], dtype=torch.int32)
        self._keys_S = _keys(cu_seqlens, prefixes) if any(prefixes) else None

    @property
    def positions_T(self) -> Tensor:
        """[T] int64 on CPU: where each token stands in its sequence, for the decoder."""
        return self._positions_T

    @property
    def rope_lengths_T(self) -> Tensor | None:
        """Of sequences that share tokens the longer one's, as transformers has it for all sequences of a batch."""
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
        self._move(q_THE.device)
        k_SKE, v_SKE = k_TKE, v_TKE
        if self._keys_S is not None:
            k_SKE, v_SKE = k_TKE.index_select(0, self._keys_S), v_TKE.index_select(0, self._keys_S)
        return flash_attention(
            q_THE,
            k_SKE,
            v_SKE,
            cu_seqlens_q_B1=self._q_starts_B1,
            cu_seqlens_k_B1=self._k_starts_B1,
            scale=scale,
            window=window,
        )

    def _move(self, device: torch.device) -> None:
        """Once, not for each layer."""
        if self._q_starts_B1.device == device:
            return
        self._q_starts_B1, self._k_starts_B1 = self._q_starts_B1.to(device), self._k_starts_B1.to(device)
        if self._keys_S is not None:
            self._keys_S = self._keys_S.to(device)


def _rope_lengths(lengths: Sequence[int], prefixes: Sequence[int]) -> list[int]:
    """Of each sequence, of the `lengths` that they have with what they begin with."""
    found = list(lengths)
    for n, prefix in enumerate(prefixes):
        if prefix:
            found[n - 1] = found[n] = max(lengths[n - 1], lengths[n])
    return found


def _keys(cu_seqlens: Sequence[int], prefixes: Sequence[int]) -> Tensor:
    """[S]: the tokens that each sequence sees, one sequence after another."""
    seen = []
    for lender, prefix, (start, stop) in zip([0, *cu_seqlens], prefixes, pairwise(cu_seqlens), strict=False):
        seen += [torch.arange(lender, lender + prefix), torch.arange(start, stop)]
    return torch.cat(seen)
