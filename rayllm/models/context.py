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
from torch.nn.functional import scaled_dot_product_attention

from rayllm.models.rope import Rotation


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

    Differentiable, keeps nothing between calls except masks.
    """

    def __init__(self, cu_seqlens: Sequence[int]) -> None:
        self._bounds = list(pairwise(cu_seqlens))
        if not self._bounds or cu_seqlens[0] != 0 or any(stop < start for start, stop in self._bounds):
            raise ValueError(f"cu_seqlens must be 0 and then where each sequence ends, ascending; got {[*cu_seqlens]}")
        lengths = torch.tensor([stop - start for start, stop in self._bounds])
        self._lengths_T = lengths.repeat_interleave(lengths)
        self._positions_T = torch.cat([torch.arange(length) for length in lengths.tolist()])
        self._longest = int(lengths.max())
        self._masks: dict[tuple[int, torch.device], Tensor] = {}

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
        q_HTE, k_KTE, v_KTE = q_THE.transpose(0, 1), k_TKE.transpose(0, 1), v_TKE.transpose(0, 1)
        outputs = []
        for start, stop in self._bounds:
            mask = self._mask(stop - start, window, q_THE.device)
            out_1HSE = scaled_dot_product_attention(
                q_HTE[None, :, start:stop],
                k_KTE[None, :, start:stop],
                v_KTE[None, :, start:stop],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q_THE.shape[1] != k_TKE.shape[1],
            )
            outputs.append(out_1HSE[0].transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _mask(self, length: int, window: int | None, device: torch.device) -> Tensor | None:
        """[S, S] boolean, True where a query may look; None: plain causal. Part of the longest sequence's mask: packs
        hold sequences of many lengths."""
        if window is None or window >= length:
            return None
        if (window, device) not in self._masks:
            all_true = torch.ones(self._longest, self._longest, dtype=torch.bool, device=device)
            self._masks[window, device] = all_true.tril() & all_true.triu(1 - window)
        return self._masks[window, device][:length, :length]
