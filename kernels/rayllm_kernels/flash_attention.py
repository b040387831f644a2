"""Attention of packed sequences of any lengths, with gradients: for training and for fresh prompts.

T queries and S keys in all, H query heads, K kv heads, E head_dim. `cu_seqlens_q_B1` and `cu_seqlens_k_B1`: int32 on
q's device, 0 and then where each of the B sequences ends, never descending, at most T and S. Sequence b owns queries
cu_seqlens_q_B1[b] to cu_seqlens_q_B1[b + 1] of `q_THE` and keys and values cu_seqlens_k_B1[b] to cu_seqlens_k_B1[b + 1]
of `k_SKE` and `v_SKE`. Its queries are the last of its keys' tokens: with n queries and m keys, query i stands at
position m - n + i. Query head h reads kv head h // (H // K).

`causal`: a query sees the keys up to its own position, else all. `window` w, causal only: itself and the w - 1 before.
A query that sees no key gives zeros and a log-sum-exp of -inf; so do rows past the last sequence.
"""

import functools
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from rayllm_kernels.dispatch import on_triton

MAX_HEAD_DIM = 256  # of the Triton kernels
_ROUND_UP = 32


def flash_attention_reference(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    *,
    cu_seqlens_q_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The contract in plain torch, on any device and under autograd -> (out_THE, lse_HT).

    Computes and returns the log-sum-exp (natural) in float32, in float64 for float64.
    """
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    group = q_THE.shape[1] // k_SKE.shape[1]
    outs, lses = [], []
    queries_of, keys_of = pairwise(cu_seqlens_q_B1.tolist()), pairwise(cu_seqlens_k_B1.tolist())
    for (q_start, q_stop), (k_start, k_stop) in zip(queries_of, keys_of, strict=True):
        q_SHE = q_THE[q_start:q_stop].to(wide)
        k, v = (x[k_start:k_stop].to(wide).repeat_interleave(group, dim=1) for x in (k_SKE, v_SKE))
        scores_HSS = torch.einsum("qhe,she->hqs", q_SHE, k) * scale
        if causal:
            queries, keys = q_stop - q_start, k_stop - k_start
            visible = _visible(keys - queries, queries, keys, window, q_THE.device)
            scores_HSS = scores_HSS.masked_fill(~visible, -torch.inf)
        lse_HS = scores_HSS.logsumexp(-1)
        level_HS1 = lse_HS.masked_fill(lse_HS == -torch.inf, 0.0).unsqueeze(-1)
        outs.append(torch.einsum("hqs,she->qhe", (scores_HSS - level_HS1).exp(), v).to(q_THE.dtype))
        lses.append(lse_HS)
    rest = q_THE.shape[0] - int(cu_seqlens_q_B1[-1])
    outs.append(q_THE.new_zeros(rest, *q_THE.shape[1:]))
    lses.append(q_THE.new_full((q_THE.shape[1], rest), -torch.inf, dtype=wide))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _visible(first: int, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] boolean: what each query sees under causality. `first`: the place of the first of them."""
    at = torch.arange(first, first + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    visible = key <= at
    return visible if window is None else visible & (key > at - window)


@functools.lru_cache(maxsize=1)  # the layers of a step that have a window have the same, as a rule
def _window_mask(size: int, window: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # may be saved for a backward pass later
        return _visible(0, size, size, window, device)


def _by_sdpa(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    *,
    cu_seqlens_q_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """The contract by torch's own attention, a call for each run of sequences that are alike -> out_THE."""
    q_lengths, k_lengths = _lengths(cu_seqlens_q_B1, q_THE.shape[0]), _lengths(cu_seqlens_k_B1, k_SKE.shape[0])
    longest = max(k_lengths[:-1], default=0)
    rounds = causal and _rounds_lengths(q_THE)
    runs = [(*lengths, len([*alike])) for lengths, alike in groupby(zip(q_lengths[:-1], k_lengths[:-1], strict=True))]
    # Not slices: the gradient of each would be as long as all sequences together, zeros but for its own.
    parts = zip(
        torch.split(q_THE, [*(queries * count for queries, _, count in runs), q_lengths[-1]])[:-1],
        torch.split(k_SKE, [*(keys * count for _, keys, count in runs), k_lengths[-1]])[:-1],
        torch.split(v_SKE, [*(keys * count for _, keys, count in runs), k_lengths[-1]])[:-1],
        runs,
        strict=True,
    )
    outputs = []
    for q_PHE, k_PKE, v_PKE, (queries, keys, count) in parts:
        first = keys - queries
        blind = queries if keys == 0 else max(0, -first) if causal else 0  # leading queries that see nothing
        if blind == queries:
            outputs.append(torch.zeros_like(q_PHE))
            continue
        q_BHQE = torch.unflatten(q_PHE, 0, (count, queries)).transpose(1, 2)[:, :, blind:]
        k_BKSE, v_BKSE = (torch.unflatten(x, 0, (count, keys)).transpose(1, 2) for x in (k_PKE, v_PKE))
        first, queries = first + blind, queries - blind
        unseen = 0
        if rounds and blind == 0:
            unseen = -queries % _ROUND_UP
            unseen_keys = unseen + -(keys + unseen) % _ROUND_UP  # no fewer, so that no query is left without a key
            q_BHQE = F.pad(q_BHQE, (0, 0, 0, unseen))
            k_BKSE, v_BKSE = (F.pad(x, (0, 0, 0, unseen_keys)) for x in (k_BKSE, v_BKSE))
            queries, keys = queries + unseen, keys + unseen_keys
        mask = None
        if causal and window is not None and window < keys:
            mask = _window_mask(longest + 2 * _ROUND_UP, window, q_THE.device)[first : first + queries, :keys]
        elif causal and queries != keys:
            mask = _visible(first, queries, keys, None, q_THE.device)
        out_BHQE = F.scaled_dot_product_attention(
            q_BHQE,
            k_BKSE,
            v_BKSE,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=q_THE.shape[1] != k_SKE.shape[1],
        )
        out_BHQE = out_BHQE[:, :, : queries - unseen]
        if blind > 0:
            out_BHQE = F.pad(out_BHQE, (0, 0, blind, 0))
        outputs.append(out_BHQE.transpose(1, 2).flatten(0, 1))
    if q_lengths[-1] > 0:
        outputs.append(q_THE.new_zeros(q_lengths[-1], *q_THE.shape[1:]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else torch.zeros_like(q_THE)


def _rounds_lengths(q_THE: Tensor) -> bool:
    """Whether sequences are padded to a multiple of `_ROUND_UP` by tokens that, under causality, none of theirs sees.

    In bfloat16 on CPU torch leaves the products of its backward pass to oneDNN, which compiles some for every length
    and keeps them: 0.7 GB after 256 lengths, and as much again in gaps between them. The padding takes less time, too.
    """
    return torch.is_grad_enabled() and q_THE.device.type == "cpu" and q_THE.dtype == torch.bfloat16


def _lengths(cu_seqlens_B1: Tensor, total: int) -> list[int]:
    """Of each sequence, and last of what comes after all of them."""
    bounds = cu_seqlens_B1.tolist()
    return [stop - start for start, stop in pairwise([*bounds, total])]


def _check(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    cu_seqlens_q_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> None:
    heads, kv_heads = q_THE.shape[1], k_SKE.shape[1]
    if k_SKE.shape != v_SKE.shape or q_THE.shape[2] != k_SKE.shape[2]:
        shapes = f"q {tuple(q_THE.shape)}, k {tuple(k_SKE.shape)}, v {tuple(v_SKE.shape)}"
        raise ValueError(f"k and v must have one shape, and q their head size: {shapes}")
    if heads % kv_heads != 0:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} kv heads evenly")
    if not q_THE.dtype == k_SKE.dtype == v_SKE.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q_THE.dtype}, {k_SKE.dtype} and {v_SKE.dtype}")
    if cu_seqlens_q_B1.shape != cu_seqlens_k_B1.shape or cu_seqlens_q_B1.dim() != 1:
        shapes = f"{tuple(cu_seqlens_q_B1.shape)} and {tuple(cu_seqlens_k_B1.shape)}"
        raise ValueError(f"the cu_seqlens of queries and keys must be of the same sequences; their shapes are {shapes}")
    if not cu_seqlens_q_B1.dtype == cu_seqlens_k_B1.dtype == torch.int32:
        raise ValueError(f"cu_seqlens must be int32, not {cu_seqlens_q_B1.dtype} and {cu_seqlens_k_B1.dtype}")
    if scale <= 0:
        raise ValueError(f"the scale of attention must be positive, not {scale}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window needs causal attention and at least 1 key; got window={window}, causal={causal}")


def _by_triton(q_THE: Tensor) -> bool:
    """float32 is left to torch: tensor cores would cut its products to 10 bits. So are heads that do not begin where 16
    elements can be read at once."""
    head_dim = q_THE.shape[2]
    is_served = q_THE.dtype in (torch.float16, torch.bfloat16) and head_dim <= MAX_HEAD_DIM and head_dim % 16 == 0
    return is_served and on_triton("flash_attention", q_THE)


def flash_attention(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    *,
    cu_seqlens_q_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Attend as the module says -> out_THE, in q's dtype; gradients for q, k and v.

    On CUDA in float16 and bfloat16, head_dim at most 256: Triton kernels, which read nothing back from the device and
    give the same bits in every run, gradients too. Elsewhere torch's own attention, a call per sequence.
    """
    _check(q_THE, k_SKE, v_SKE, cu_seqlens_q_B1, cu_seqlens_k_B1, scale, causal, window)
    if _by_triton(q_THE):
        from rayllm_kernels.gpu.flash_attention import attend

        out_THE: Tensor = attend(q_THE, k_SKE, v_SKE, cu_seqlens_q_B1, cu_seqlens_k_B1, scale, causal, window)[0]
        return out_THE
    return _by_sdpa(
        q_THE,
        k_SKE,
        v_SKE,
        cu_seqlens_q_B1=cu_seqlens_q_B1,
        cu_seqlens_k_B1=cu_seqlens_k_B1,
        scale=scale,
        causal=causal,
        window=window,
    )


def flash_attention_with_lse(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    *,
    cu_seqlens_q_B1: Tensor,
    cu_seqlens_k_B1: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (out_THE, lse_HT): also the natural log of each row's sum of e**score, by which partial results over disjoint
    keys merge. Both are differentiable. Without Triton by the reference, whose scores take T x S memory per head."""
    _check(q_THE, k_SKE, v_SKE, cu_seqlens_q_B1, cu_seqlens_k_B1, scale, causal, window)
    if _by_triton(q_THE):
        from rayllm_kernels.gpu.flash_attention import attend

        out_THE, lse_HT = attend(q_THE, k_SKE, v_SKE, cu_seqlens_q_B1, cu_seqlens_k_B1, scale, causal, window)
        return out_THE, lse_HT
    return flash_attention_reference(
        q_THE,
        k_SKE,
        v_SKE,
        cu_seqlens_q_B1=cu_seqlens_q_B1,
        cu_seqlens_k_B1=cu_seqlens_k_B1,
        scale=scale,
        causal=causal,
        window=window,
    )
