"""Log-probabilities of the model's own distribution: float32, before bias, penalties, temperature and filters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayllm.engine.order_keys import best_keys, token_ids
from rayllm.scheduler.batch import PositionLogprobs

# Elements of one float32 buffer; a chunk of logits is worked on in a handful of buffers of this order.
_CHUNK_ELEMENTS = 1 << 21


def position_logprobs(
    logits_TV: Tensor, target_ids_T: Tensor, num_top_T: Sequence[int], asked_T: Sequence[Sequence[int]] | None = None
) -> list[PositionLogprobs]:
    """For each of T positions: the target's logprob and rank, and the `num_top_T[t]` most likely tokens, best first,
    followed by the tokens `asked_T[t]`.

    `rank` is 1 + the number of tokens strictly more likely; equally likely tokens stand in `top` in the order of
    their ids. Where the logits are NaN, so are the logprobs; a token that cannot occur has -inf.
    """
    chunk = max(1, _CHUNK_ELEMENTS // logits_TV.shape[-1])
    positions: list[PositionLogprobs] = []
    for start in range(0, len(logits_TV), chunk):
        rows = slice(start, start + chunk)
        num_top = num_top_T[rows]
        asked: Sequence[Sequence[int]] = [()] * len(num_top) if asked_T is None else asked_T[rows]
        widest = min(max(num_top), logits_TV.shape[-1])
        table = _table(logits_TV[rows], target_ids_T[rows], widest, asked)
        for row, n, ids in zip(table, num_top, asked, strict=True):
            target, rank, logprob, *others = row
            pairs = [(int(i), logprob) for i, logprob in zip(others[::2], others[1::2], strict=True)]
            positions.append(
                PositionLogprobs(
                    token_id=int(target),
                    logprob=logprob,
                    rank=int(rank),
                    top=pairs[: min(n, widest)] + pairs[widest : widest + len(ids)],
                )
            )
    return positions


def _table(
    logits_TV: Tensor, target_ids_T: Tensor, num_top: int, asked_T: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Rows of (target, rank, its logprob, top id, its logprob, top id, ..., asked id, its logprob, ...), all as wide as
    the widest: one float64 tensor, one transfer."""
    logits_TV = logits_TV.float()
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    targets_T1 = target_ids_T[:, None]
    ranks_T1 = (logits_TV > logits_TV.gather(-1, targets_T1)).sum(dim=-1, keepdim=True) + 1
    columns = [targets_T1, ranks_T1, logprobs_TV.gather(-1, targets_T1)]
    if num_top:
        columns.append(_with_logprobs(token_ids(best_keys(logits_TV, num_top)), logprobs_TV))
    if num_asked := max(map(len, asked_T)):
        padded = [[*ids, *[0] * (num_asked - len(ids))] for ids in asked_T]
        columns.append(_with_logprobs(torch.tensor(padded, device=logits_TV.device), logprobs_TV))
    table: list[list[float]] = torch.cat([column.double() for column in columns], dim=-1).tolist()
    return table


def _with_logprobs(ids_TK: Tensor, logprobs_TV: Tensor) -> Tensor:
    """Pairs of id and logprob, flat: [T, 2K]."""
    return torch.stack((ids_TK, logprobs_TV.gather(-1, ids_TK)), dim=-1).flatten(1)
