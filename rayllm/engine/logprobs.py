"""Log-probabilities of the model's own distribution: float32, before bias, penalties, temperature and filters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayllm.engine.order_keys import best_keys, token_ids
from rayllm.scheduler.batch import PositionLogprobs

# Elements of one float32 buffer; a chunk of logits is worked on in a handful of buffers of this order.
_CHUNK_ELEMENTS = 1 << 21


def position_logprobs(logits_TV: Tensor, target_ids_T: Tensor, num_top_T: Sequence[int]) -> list[PositionLogprobs]:
    """For each of T positions: the target's logprob and rank, and the `num_top_T[t]` most likely tokens, best first.

    `rank` is 1 + the number of tokens strictly more likely; equally likely tokens stand in `top` in the order of
    their ids. Where the logits are NaN, so are the logprobs; a token that cannot occur has -inf.
    """
    chunk = max(1, _CHUNK_ELEMENTS // logits_TV.shape[-1])
    positions: list[PositionLogprobs] = []
    for start in range(0, len(logits_TV), chunk):
        rows = slice(start, start + chunk)
        num_top = num_top_T[rows]
        for row, n in zip(_table(logits_TV[rows], target_ids_T[rows], max(num_top)), num_top, strict=True):
            target, rank, logprob, *top = row
            pairs = zip(top[::2], top[1::2], strict=True)
            positions.append(
                PositionLogprobs(
                    token_id=int(target),
                    logprob=logprob,
                    rank=int(rank),
                    top=[(int(token_id), logprob) for token_id, logprob in list(pairs)[:n]],
                )
            )
    return positions


def _table(logits_TV: Tensor, target_ids_T: Tensor, num_top: int) -> list[list[float]]:
    """Rows of (target, rank, its logprob, top id, its logprob, top id, ...): one float64 tensor, one transfer."""
    logits_TV = logits_TV.float()
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    targets_T1 = target_ids_T[:, None]
    ranks_T1 = (logits_TV > logits_TV.gather(-1, targets_T1)).sum(dim=-1, keepdim=True) + 1
    columns = [targets_T1, ranks_T1, logprobs_TV.gather(-1, targets_T1)]
    if num_top:
        ids = token_ids(best_keys(logits_TV, min(num_top, logits_TV.shape[-1])))
        columns.append(torch.stack((ids, logprobs_TV.gather(-1, ids)), dim=-1).flatten(1))
    table: list[list[float]] = torch.cat([column.double() for column in columns], dim=-1).tolist()
    return table
