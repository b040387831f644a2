"""The attention of a serving step: write this step's keys and values into pages, attend over the pages."""

from dataclasses import dataclass

from torch import Tensor

from rayllm.engine.kv_cache import KVCache
from rayllm.models.rope import Rotation
from rayllm_kernels import paged_attention, rotary_store_kv, store_kv


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedContext:
    """A `ForwardContext` over the paged cache; see `PersistentBatch.step` for the arrays."""

    cache: KVCache
    block_tables_RM: Tensor
    rows_B: Tensor
    query_start_B1: Tensor
    context_lens_B: Tensor
    slots_T: Tensor
    rope_lengths_T: Tensor | None

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
        if rotation is None:
            store_kv(k_TKE, v_TKE, *target)
        else:
            q_THE = rotary_store_kv(q_THE, k_TKE, v_TKE, rotation.cos_TE, rotation.sin_TE, *target)
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
