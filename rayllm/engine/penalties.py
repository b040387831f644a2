"""Which tokens a sequence has seen and how often, on the device, and the penalties that follow from it.

Only sequences that use a penalty take a slot, so that everybody else costs neither memory nor time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.engine.row_index import RowIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class RepetitionPenalty:
    """For P rows of a batch: `rows` indexes the batch, `slots_P` the table."""

    rows: RowIndex
    slots_P: Tensor
    factor_P1: Tensor  # float32


@dataclass(frozen=True, kw_only=True, slots=True)
class OccurrencePenalty:
    """Frequency and presence penalty for P rows of a batch: `rows` indexes the batch, `slots_P` the table."""

    rows: RowIndex
    slots_P: Tensor
    frequency_P1: Tensor  # float32
    presence_P1: Tensor  # float32


class PenaltyTable:
    """One slot of [V] token counts per sequence that uses a penalty; N slots, doubled when they run out."""

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._seen_NV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)  # in the prompt or the output
        # In the output; float32 holds every count below MAX_TOKENS exactly and needs no conversion in each step.
        self._count_NV = torch.zeros(0, vocab_size, dtype=torch.float32, device=device)
        self._free: list[int] = []
        self._appended: list[tuple[int, int]] = []  # (slot, token) not yet in the tables

    def acquire(self, prompt: Sequence[int], output: Sequence[int]) -> int:
        """A slot that holds the counts of these tokens."""
        self._flush()
        if not self._free:
            self._grow()
        slot = self._free.pop()
        prompt_ids, output_ids = self._ids(prompt), self._ids(output)
        seen_V, count_V = self._seen_NV[slot], self._count_NV[slot]
        seen_V.zero_()
        seen_V[prompt_ids] = True
        seen_V[output_ids] = True
        count_V.copy_(torch.bincount(output_ids, minlength=self._vocab_size))
        return slot

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def append(self, slot: int, token_id: int) -> None:
        """One more output token; the tables take it in before they are next used."""
        self._appended.append((slot, token_id))

    def apply_repetition(self, scores_BV: Tensor, penalty: RepetitionPenalty) -> None:
        """In place. Keskar et al. 2019 as transformers applies it: scores of tokens seen are divided if positive,
        multiplied if negative."""
        self._flush()
        scores = scores_BV[penalty.rows]
        # Arithmetic in place of torch.where, which is several times slower on a CPU; every step that decides is exact.
        seen = self._seen_NV[penalty.slots_P].float()
        factor = seen * penalty.factor_P1
        factor += 1.0 - seen
        positive = scores.clamp(min=0.0)
        positive /= factor
        negative = scores.clamp(max=0.0)
        negative *= factor
        scores_BV[penalty.rows] = positive + negative

    def apply_occurrence(self, scores_BV: Tensor, penalty: OccurrencePenalty) -> None:
        """In place. OpenAI's definition: score - count * frequency - (count > 0) * presence."""
        self._flush()
        count = self._count_NV[penalty.slots_P]
        # Each step is rounded by itself, never fused: the result may not depend on how a kernel is vectorised.
        scores = scores_BV[penalty.rows] - count * penalty.frequency_P1
        scores -= count.clamp_(max=1.0) * penalty.presence_P1
        scores_BV[penalty.rows] = scores

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self._device)

    def _grow(self) -> None:
        num_slots = len(self._seen_NV)
        added = max(num_slots, 1)
        self._seen_NV = torch.cat((self._seen_NV, self._seen_NV.new_zeros(added, self._vocab_size)))
        self._count_NV = torch.cat((self._count_NV, self._count_NV.new_zeros(added, self._vocab_size)))
        self._free.extend(range(num_slots, num_slots + added))

    def _flush(self) -> None:
        if not self._appended:
            return
        slots, ids = torch.tensor(self._appended, device=self._device).unbind(dim=1)
        self._seen_NV[slots, ids] = True
        self._count_NV.index_put_((slots, ids), self._count_NV.new_ones(()), accumulate=True)
        self._appended.clear()
