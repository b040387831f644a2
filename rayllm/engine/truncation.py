"""Temperature, top-k, top-p and min-p over a batch of scores, as transformers' warpers define and order them.

The filtered distribution comes out as integers, proportional to the probabilities. Integer sums are associative:
what is sampled from them is the same bit for bit whatever the batch, the threads or the order of a reduction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.engine.order_keys import best_keys, token_ids
from rayllm.scheduler.batch import SamplerSpec

# Probability 1 as an integer. A float32 probability above 2**-37 is represented exactly, one below 2**-61 becomes 0,
# and the sum over a vocabulary stays below 2**62 (softmax in float32 sums to 1 within far less than a factor 2).
_ONE = 1 << 61

# How many of a row's best tokens are tried before all are sorted: nearly every nucleus fits in the first, and on a
# CPU a full sort of a row costs about ten times the second.
PREFIX_SIZES = (128, 2048)


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """The parameters of S rows, on the scores' device. A row that does not use a filter holds its neutral value."""

    temperature_S1: Tensor  # float32, above 0
    top_k_S1: Tensor  # int64; vocab_size: all
    top_p_S1: Tensor  # float64; 1: all
    min_p_S1: Tensor  # float32; 0: all
    truncates: bool  # every row uses top-k or top-p; otherwise none does
    uses_min_p: bool  # some row does

    @classmethod
    def build(cls, specs: Sequence[SamplerSpec], vocab_size: int, device: torch.device) -> "Filters":
        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        truncating = {truncates(spec, vocab_size) for spec in specs}
        assert len(truncating) == 1, "rows that truncate and rows that do not are filtered apart"
        tiny = torch.finfo(torch.float32).tiny  # a temperature below it would round to 0
        top_k = [spec.top_k if 0 < spec.top_k < vocab_size else vocab_size for spec in specs]
        return cls(
            temperature_S1=column([max(spec.temperature, tiny) for spec in specs], torch.float32),
            top_k_S1=torch.tensor(top_k, device=device)[:, None],
            top_p_S1=column([spec.top_p for spec in specs], torch.float64),
            min_p_S1=column([spec.min_p for spec in specs], torch.float32),
            truncates=truncating.pop(),
            uses_min_p=any(spec.min_p > 0.0 for spec in specs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """What is left of some rows' distributions: weight / sum of the weights is the probability, of all others 0.

    A row's weights sum to less than 2**62. They are all 0 where the row's best score is not finite.
    """

    rows_C: Tensor  # which of the S rows
    token_ids_CK: Tensor  # ascending
    weights_CK: Tensor  # int64

    def select(self, mask_C: Tensor) -> "Candidates":
        return Candidates(
            rows_C=self.rows_C[mask_C], token_ids_CK=self.token_ids_CK[mask_C], weights_CK=self.weights_CK[mask_C]
        )


def truncates(spec: SamplerSpec, vocab_size: int) -> bool:
    """Whether top-k or top-p can take a token away."""
    return 0 < spec.top_k < vocab_size or spec.top_p < 1.0


def filtered(
    scores_SV: Tensor, filters: Filters, *, prefix_sizes: Sequence[int] = PREFIX_SIZES
) -> Iterator[Candidates]:
    """The distribution of every row of float32 scores after all filters; each row comes in one of the `Candidates`.

    Of equal scores at the edge of top-k all are kept (as transformers does), at the edge of top-p the lower ids.
    If the filters truncate, only the best few tokens are sorted; a row whose edge lies outside of them is tried
    again with more, at last with all. The result does not depend on `prefix_sizes`.
    """
    # Before the division, so that a low temperature cannot overflow; the softmax is the same.
    tempered_SV = scores_SV - scores_SV.amax(dim=-1, keepdim=True)
    tempered_SV /= filters.temperature_S1
    probs_SV = tempered_SV.softmax(dim=-1).nan_to_num_(0.0)
    num_rows, vocab_size = scores_SV.shape
    rows = torch.arange(num_rows, device=scores_SV.device)
    all_ids_V = torch.arange(vocab_size, device=scores_SV.device)
    if not filters.truncates:
        if filters.uses_min_p:
            probs_SV.masked_fill_(probs_SV < filters.min_p_S1 * probs_SV.amax(dim=-1, keepdim=True), 0.0)
        yield Candidates(rows_C=rows, token_ids_CK=all_ids_V.expand_as(probs_SV), weights_CK=_weights(probs_SV))
        return
    for size in (*(size for size in prefix_sizes if size < vocab_size), vocab_size):
        # Ordered by the scores before the temperature, whose division could make two of them equal.
        keys = best_keys(scores_SV if len(rows) == num_rows else scores_SV[rows], size)
        ids = token_ids(keys)
        probs = probs_SV[rows[:, None], ids]
        weights = _weights(probs)
        kept, found = _truncate(keys, weights, filters.top_k_S1[rows], filters.top_p_S1[rows], vocab_size)
        kept &= probs >= filters.min_p_S1[rows] * probs[:, :1]
        weights.masked_fill_(~kept, 0)
        if size < vocab_size:
            ids, order = ids.sort(dim=-1)
            weights = weights.gather(-1, order)
        else:  # every id once: putting each weight in its place sorts them
            weights = torch.empty_like(weights).scatter_(-1, ids, weights)
            ids = all_ids_V.expand_as(weights)
        candidates = Candidates(rows_C=rows, token_ids_CK=ids, weights_CK=weights)
        if found.all():
            yield candidates
            return
        yield candidates.select(found)
        rows = rows[~found]


def draw(candidates: Candidates, uniform_C: Tensor) -> Tensor:
    """Inverse of the cumulative distribution in the order of the token ids -> one token id per row.

    `uniform_C` is uniform in [0, 2**62). The token is the first whose cumulative weight exceeds
    floor(uniform * total / 2**62): all integers, so one of weight 0 is never drawn. A row of zeros gives an id that
    means nothing. The order is by id and not by probability because then a change of the scores in their last
    bits moves the borders between tokens by as little, where an order by probability could swap whole tokens.
    """
    cumulative_CK = candidates.weights_CK.cumsum(dim=-1)
    total_C1 = cumulative_CK[:, -1:]
    # The upper half of a 62 x 62 bit product, from 31 bit halves.
    mask = (1 << 31) - 1
    a, b = total_C1 >> 31, total_C1 & mask
    c, d = uniform_C[:, None] >> 31, uniform_C[:, None] & mask
    target_C1 = a * c + ((a * d + b * c + (b * d >> 31)) >> 31)
    position_C1 = torch.searchsorted(cumulative_CK, target_C1, right=True)
    position_C1.clamp_(max=cumulative_CK.shape[-1] - 1)
    return candidates.token_ids_CK.gather(-1, position_C1)[:, 0]


def _truncate(
    keys_CK: Tensor, weights_CK: Tensor, top_k_C1: Tensor, top_p_C1: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Top-k, then top-p over each row's K best tokens, best first -> kept [C, K], found [C].

    A token survives top-p if the tokens before it hold less than `top_p` of the mass that top-k left. A row is found
    if no token outside of the K could have survived.
    """
    size = keys_CK.shape[-1]
    uses_top_k = top_k_C1 < vocab_size
    kth_C1 = keys_CK.gather(-1, top_k_C1.clamp(max=size) - 1)
    in_top_k = (keys_CK >> 32 >= kth_C1 >> 32) | ~uses_top_k  # the upper half is the score: equal ones stay
    weights_CK = weights_CK.masked_fill(~in_top_k, 0)
    cumulative_CK = weights_CK.cumsum(dim=-1)
    mass_C1 = torch.where(uses_top_k, cumulative_CK[:, -1:], _ONE)
    kept_CK = cumulative_CK - weights_CK < mass_C1 * top_p_C1
    top_k_found_C1 = ~uses_top_k | (top_k_C1 <= size) & ~in_top_k[:, -1:]
    nothing_left_C1 = (weights_CK[:, -1:] == 0) & in_top_k[:, -1:]
    found_C1 = top_k_found_C1 & ~kept_CK[:, -1:] | nothing_left_C1
    return kept_CK, found_C1[:, 0] | (size == vocab_size)


def _weights(probs: Tensor) -> Tensor:
    return (probs * float(_ONE)).to(torch.int64)
