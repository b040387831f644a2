"""What a batch asks of the sampler, gathered once and kept on the device for as long as the batch stays the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayllm.engine.penalties import OccurrencePenalty, RepetitionPenalty
from rayllm.engine.row_index import RowIndex, row_index
from rayllm.engine.truncation import Filters, truncates
from rayllm.scheduler.batch import SamplerSpec

# Elements of one [rows, V] buffer while sampling; more rows are worked on one group after the other.
_GROUP_ELEMENTS = 1 << 21


@dataclass(kw_only=True, slots=True)
class RowState:
    """One sequence of the persistent batch. `num_output` counts the tokens generated so far, over preemptions too."""

    spec: SamplerSpec
    num_output: int
    suppressed: Tensor  # int64 ids inside the vocabulary
    penalty_slot: int | None  # in the penalty table; None: no penalty is used


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitBias:
    """One entry for each biased (row of the batch, token)."""

    rows: Tensor
    token_ids: Tensor
    values: Tensor  # float32


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawGroup:
    """Rows of the batch that are sampled together, as opposed to greedily decoded."""

    rows: RowIndex  # in the batch
    states: tuple[RowState, ...]
    seeds: NDArray[np.uint64]
    filters: Filters


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """`suppressing`: (row of the batch, state) where min_tokens may still hold back some tokens."""

    states: tuple[RowState, ...]
    bias: LogitBias | None
    suppressing: tuple[tuple[int, RowState], ...]
    repetition: RepetitionPenalty | None
    occurrence: OccurrencePenalty | None
    draws: tuple[DrawGroup, ...]
    logprob_rows: tuple[int, ...]
    logprob_index: RowIndex

    @classmethod
    def build(cls, states: Sequence[RowState], vocab_size: int, device: torch.device) -> "SamplingPlan":
        specs = [state.spec for state in states]

        def positions(wanted: Callable[[SamplerSpec], bool]) -> list[int]:
            return [i for i, spec in enumerate(specs) if wanted(spec)]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        def slots(rows: list[int]) -> Tensor:
            return torch.tensor([states[i].penalty_slot for i in rows], device=device)

        suppressing = positions(lambda spec: spec.min_tokens > 0 and bool(spec.suppressed))
        repeating = positions(uses_repetition)
        occurring = positions(uses_occurrence)
        drawn = positions(lambda spec: spec.temperature > 0.0)
        plain = [i for i in drawn if not truncates(specs[i], vocab_size)]  # apart: they need no order of the vocabulary
        truncated = [i for i in drawn if truncates(specs[i], vocab_size)]
        size = max(1, _GROUP_ELEMENTS // vocab_size)
        groups = [rows[i : i + size] for rows in (plain, truncated) for i in range(0, len(rows), size)]
        logprob_rows = positions(lambda spec: spec.logprobs is not None)
        return cls(
            states=tuple(states),
            bias=_bias(specs, vocab_size, device),
            suppressing=tuple((i, states[i]) for i in suppressing),
            repetition=RepetitionPenalty(
                rows=row_index(repeating, device),
                slots_P=slots(repeating),
                factor_P1=column([specs[i].repetition_penalty for i in repeating]),
            )
            if repeating
            else None,
            occurrence=OccurrencePenalty(
                rows=row_index(occurring, device),
                slots_P=slots(occurring),
                frequency_P1=column([specs[i].frequency_penalty for i in occurring]),
                presence_P1=column([specs[i].presence_penalty for i in occurring]),
            )
            if occurring
            else None,
            draws=tuple(
                DrawGroup(
                    rows=row_index(rows, device),
                    states=tuple(states[i] for i in rows),
                    seeds=np.array([specs[i].seed for i in rows], dtype=np.uint64),
                    filters=Filters.build([specs[i] for i in rows], vocab_size, device),
                )
                for rows in groups
            ),
            logprob_rows=tuple(logprob_rows),
            logprob_index=row_index(logprob_rows, device),
        )


def uses_repetition(spec: SamplerSpec) -> bool:
    return spec.repetition_penalty != 1.0


def uses_occurrence(spec: SamplerSpec) -> bool:
    return spec.frequency_penalty != 0.0 or spec.presence_penalty != 0.0


def _bias(specs: Sequence[SamplerSpec], vocab_size: int, device: torch.device) -> LogitBias | None:
    entries = [
        (row, token_id, value)
        for row, spec in enumerate(specs)
        for token_id, value in spec.logit_bias.items()
        if token_id < vocab_size
    ]
    if not entries:
        return None
    rows, token_ids, values = zip(*entries, strict=True)
    return LogitBias(
        rows=torch.tensor(rows, device=device),
        token_ids=torch.tensor(token_ids, device=device),
        values=torch.tensor(values, dtype=torch.float32, device=device),
    )
