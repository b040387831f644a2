"""The attention of a serving step: write this step's keys and values into pages, attend over the pages, or, where all
that a sequence sees is of this step, over its keys and values as they come."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.engine.kv_cache import KVCache
from rayllm.models.rope import Rotation
from rayllm_kernels import flash_attention, paged_attention, rotary_store_kv, store_kv


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """The sequences at the end of a step that have their whole context in it, and attend without pages."""

    first_token: int
    cu_seqlens: Tensor  # int32, counted from `first_token`


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedContext:
    """A `ForwardContext` over the paged cache; see `PersistentBatch.step` for the arrays.

    `rows_B`, `query_start_B1` and `context_lens_B` are of the sequences that attend over pages, `slots_T` of all.
    """

    cache: KVCache
    block_tables_RM: Tensor
    rows_B: Tensor
    query_start_B1: Tensor
    context_lens_B: Tensor
    slots_T: Tensor
    rope_lengths_T: Tensor | None
    prompts: Prompts | None

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
        k_pages, v_pages, k_scales, v_scales = self.cache.pages(layer)
        target = (k_pages, v_pages, self.slots_T, k_scales, v_scales)
        if rotation is not None and self.prompts is None:
            q_THE = rotary_store_kv(q_THE, k_TKE, v_TKE, rotation.cos_TE, rotation.sin_TE, *target)
        else:
            if rotation is not None:
                q_THE, k_TKE = rotation.apply(q_THE, k_TKE)
            store_kv(k_TKE, v_TKE, *target)
        if self.prompts is None:
            return self._attend_pages(layer, q_THE, scale, window)
        first = self.prompts.first_token
        of_prompts_THE = flash_attention(
            q_THE[first:],
            k_TKE[first:],
            v_TKE[first:],
            cu_seqlens_q_B1=self.prompts.cu_seqlens,
            cu_seqlens_k_B1=self.prompts.cu_seqlens,
            scale=scale,
            window=window,
        )
        if first == 0:
            return of_prompts_THE
        of_pages_THE = self._attend_pages(layer, q_THE[:first], scale, window)
        return torch.cat((of_pages_THE, of_prompts_THE))

    def _attend_pages(self, layer: int, q_THE: Tensor, scale: float, window: int | None) -> Tensor:
        k_pages, v_pages, k_scales, v_scales = self.cache.pages(layer)
        return paged_attention(
            q_THE,
            k_pages,
            v_pages,
            k_scales_NPK=k_scales,
            v_scales_NPK=v_scales,
            block_tables_RM=self.block_tables_RM,
            rows_B=self.rows_B,
            query_start_B1=self.query_start_B1,
            context_lens_B=self.context_lens_B,
            scale=scale,
            window=window,
        )
