"""From what is known of tokens, or of whole documents, to the answers of preference pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.train.batch import IGNORE, MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLogps:
    """Of P pairs: the log-probability of each answer, summed over its tokens, and how many those are. Sums are float64:
    losses are of small differences between large ones."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor


def num_pairs(batch: MicroBatch) -> int:
    _, tokens_N = _document_sums(torch.zeros_like(batch.targets_T), batch)
    chosen_P, _ = _halves(tokens_N)
    return int((chosen_P > 0).sum())


def pair_logps(log_probs_T: Tensor, batch: MicroBatch) -> PairLogps:
    """`log_probs_T`: of each target of `batch`, 0 where there is none. What pads the batch is left out."""
    sums_N, tokens_N = _document_sums(log_probs_T, batch)
    (chosen_P, rejected_P), (chosen_tokens_P, rejected_tokens_P) = _halves(sums_N), _halves(tokens_N)
    is_pair_P = chosen_tokens_P > 0  # an answer has its end at least
    return PairLogps(
        chosen_P=chosen_P[is_pair_P],
        rejected_P=rejected_P[is_pair_P],
        chosen_tokens_P=chosen_tokens_P[is_pair_P],
        rejected_tokens_P=rejected_tokens_P[is_pair_P],
    )


def pair_scores(scores_N: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """[P] each, of the chosen and of the rejected documents, from one value for each. What pads the batch is left
    out."""
    _, tokens_N = _document_sums(torch.zeros_like(batch.targets_T, dtype=scores_N.dtype), batch)
    (chosen_P, rejected_P), (chosen_tokens_P, _) = _halves(scores_N), _halves(tokens_N)
    is_pair_P = chosen_tokens_P > 0
    return chosen_P[is_pair_P], rejected_P[is_pair_P]


def reference_logps(values_N: Tensor, policy: PairLogps, batch: MicroBatch) -> PairLogps:
    """The same of values that were stored for each document; see `rayllm.train.data.reference`."""
    chosen_P, rejected_P = pair_scores(values_N, batch)
    return PairLogps(
        chosen_P=chosen_P,
        rejected_P=rejected_P,
        chosen_tokens_P=policy.chosen_tokens_P,
        rejected_tokens_P=policy.rejected_tokens_P,
    )


def _halves(values_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of the chosen and of the rejected documents. One that is left over pads the batch."""
    pairs = len(values_N) // 2
    return values_N[0 : 2 * pairs : 2], values_N[1 : 2 * pairs : 2]


def _document_sums(values_T: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """-> [N] sums over the documents' tokens, and how many targets each has."""
    lengths = [length for row in batch.document_lengths for length in row]
    lengths_N = torch.tensor(lengths, device=values_T.device)
    document_T = torch.arange(len(lengths), device=values_T.device).repeat_interleave(lengths_N)
    sums_N = torch.zeros(len(lengths), dtype=torch.float64, device=values_T.device).index_add(
        0, document_T, values_T.double()
    )
    tokens_N = torch.zeros_like(lengths_N).index_add(0, document_T, (batch.targets_T != IGNORE).long())
    return sums_N, tokens_N
