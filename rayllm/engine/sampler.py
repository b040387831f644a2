"""Chooses the next token of every sequence of a batch, in one pass over the logits [B, V].

Order: logit_bias, min_tokens, repetition penalty, frequency and presence penalty; then argmax, or temperature, top-k,
top-p, min-p and a draw. Logprobs are of the raw logits. Token t of a sequence depends on its seed, on t and on
its own logits only: never on the batch, on the row it has, or on what the sampler did before. So a sequence
that is taken out and added again with its tokens goes on as if nothing had happened.

Knows nothing of stop conditions, text, blocks or the model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayllm.engine.counter_rng import uniform_bits
from rayllm.engine.logprobs import position_logprobs
from rayllm.engine.penalties import PenaltyTable
from rayllm.engine.sampling_plan import DrawGroup, RowState, SamplingPlan, uses_occurrence, uses_repetition
from rayllm.engine.truncation import draw, filtered
from rayllm.scheduler.batch import NO_TOKEN, NewSequence, PositionLogprobs


class Sampler:
    """Holds the sampling state of `max_rows` rows. Not thread-safe: one step loop calls it."""

    def __init__(self, *, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._states: list[RowState | None] = [None] * max_rows
        self._penalties = PenaltyTable(vocab_size=vocab_size, device=device)
        self._planned_rows: tuple[int, ...] | None = None  # None: a row has changed since the plan was made
        self._plan: SamplingPlan | None = None

    @torch.inference_mode()
    def add(self, row: int, sequence: NewSequence) -> None:
        """`sequence.token_ids` may already hold generated tokens after its `prompt_len` first ones.

        Ids outside the vocabulary have no effect in `logit_bias` and `suppressed`: they are never sampled anyway.
        """
        assert self._states[row] is None, f"row {row} is taken"
        spec, prompt_len = sequence.sampler, sequence.prompt_len
        slot: int | None = None
        if uses_repetition(spec) or uses_occurrence(spec):
            slot = self._penalties.acquire(sequence.token_ids[:prompt_len], sequence.token_ids[prompt_len:])
        self._states[row] = RowState(
            spec=spec,
            num_output=len(sequence.token_ids) - prompt_len,
            suppressed=torch.tensor(
                [token_id for token_id in spec.suppressed if token_id < self._vocab_size],
                dtype=torch.int64,
                device=self._device,
            ),
            penalty_slot=slot,
        )
        self._planned_rows = None

    def append(self, row: int, token_id: int) -> None:
        """`token_id` has become part of the sequence."""
        assert 0 <= token_id < self._vocab_size, f"token {token_id} is outside the vocabulary"
        state = self._state(row)
        state.num_output += 1
        if state.penalty_slot is not None:
            self._penalties.append(state.penalty_slot, token_id)

    def remove(self, row: int) -> None:
        state = self._state(row)
        if state.penalty_slot is not None:
            self._penalties.release(state.penalty_slot)
        self._states[row] = None
        self._planned_rows = None

    @torch.inference_mode()
    def sample(self, logits_BV: Tensor, rows: Sequence[int]) -> list[tuple[int, PositionLogprobs | None]]:
        """The next token of each of `rows`, and its logprobs where asked for. Appends nothing, leaves the logits alone.

        A row without a finite best score (NaN, +inf, or -inf everywhere: a fault in the model or its weights) gives
        `NO_TOKEN` and no logprobs; the other rows are not touched by it.
        """
        assert logits_BV.shape == (len(rows), self._vocab_size), f"{tuple(logits_BV.shape)} for {len(rows)} rows"
        if not rows:
            return []
        plan = self._plan_for(rows)
        scores_BV = self._adjusted_scores(logits_BV, plan)
        best_B, ids_B = scores_BV.max(dim=-1)  # NaN, where there is one, is the maximum
        for group in plan.draws:
            ids_B[group.rows] = self._draw(scores_BV[group.rows], group)
        finite_B = best_B.isfinite()

        logprobs: dict[int, PositionLogprobs] = {}
        if plan.logprob_rows:
            specs = [plan.states[i].spec for i in plan.logprob_rows]
            num_top = [spec.logprobs or 0 for spec in specs]
            asked = [spec.logprob_token_ids for spec in specs]
            index = plan.logprob_index
            positions = position_logprobs(logits_BV[index], ids_B[index], num_top, asked)
            logprobs = dict(zip(plan.logprob_rows, positions, strict=True))
        token_ids: list[int] = ids_B.where(finite_B, NO_TOKEN).tolist()
        return [(token_id, logprobs.get(i) if token_id != NO_TOKEN else None) for i, token_id in enumerate(token_ids)]

    @torch.inference_mode()
    def prompt_logprobs(self, logits_TV: Tensor, target_ids: Sequence[int], n: int) -> list[PositionLogprobs]:
        """For logits at T prompt positions and the T tokens that follow them; `n` alternatives each.

        Needs no row. Works through bounded chunks, so the memory does not grow with T.
        """
        targets_T = torch.tensor(target_ids, dtype=torch.int64, device=self._device)
        return position_logprobs(logits_TV, targets_T, [n] * len(target_ids))

    def _state(self, row: int) -> RowState:
        state = self._states[row]
        assert state is not None, f"row {row} is empty"
        return state

    def _plan_for(self, rows: Sequence[int]) -> SamplingPlan:
        key = tuple(rows)
        if self._plan is None or key != self._planned_rows:
            self._plan = SamplingPlan.build([self._state(row) for row in key], self._vocab_size, self._device)
            self._planned_rows = key
        return self._plan

    def _draw(self, scores_SV: Tensor, group: DrawGroup) -> Tensor:
        num_output = np.array([state.num_output for state in group.states], dtype=np.uint64)
        uniform_S = torch.from_numpy(uniform_bits(group.seeds, num_output)).to(self._device)
        ids_S = torch.empty_like(uniform_S)
        for candidates in filtered(scores_SV, group.filters):
            ids_S[candidates.rows_C] = draw(candidates, uniform_S[candidates.rows_C])
        return ids_S

    def _adjusted_scores(self, logits_BV: Tensor, plan: SamplingPlan) -> Tensor:
        """float32 scores after bias, min_tokens and penalties; the logits themselves if nothing changes them."""
        suppressing = [(i, state) for i, state in plan.suppressing if state.num_output < state.spec.min_tokens]
        changed = plan.bias or suppressing or plan.repetition or plan.occurrence
        scores_BV = logits_BV.to(torch.float32, copy=bool(changed))
        if plan.bias is not None:
            bias = plan.bias
            scores_BV.index_put_((bias.rows, bias.token_ids), bias.values, accumulate=True)
        for i, state in suppressing:
            scores_BV[i].index_fill_(0, state.suppressed, float("-inf"))
        if plan.repetition is not None:
            self._penalties.apply_repetition(scores_BV, plan.repetition)
        if plan.occurrence is not None:
            self._penalties.apply_occurrence(scores_BV, plan.occurrence)
        return scores_BV
