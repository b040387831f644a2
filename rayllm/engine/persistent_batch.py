"""A rank's memory of the running sequences, row by row, and the arrays of one step read out of it.

Each sequence keeps one row from its admission until its release. A step appends to the rows and gathers from them what
it feeds to the model; nothing here is copied in proportion to a sequence's context. Plain numpy: knows nothing of the
model or the device.

Letters: R rows, S positions, M blocks of a row, B scheduled sequences, T tokens of the step.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayllm.scheduler.batch import Batch, NewSequence

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepArrays:
    rows_B: Ints
    query_start_B1: Ints  # cumulative number of tokens, starts with 0
    context_lens_B: Ints  # tokens in the cache once this step's are stored
    tokens_T: Longs
    positions_T: Longs
    slots_T: Longs  # block * block_size + offset
    rope_lengths_T: Longs  # max(prompt length, position + 1)

    def num_prompts(self, shortest: int) -> int:
        """How many sequences at the end of the step have their whole context in it, of `shortest` tokens or more."""
        lens_B = np.diff(self.query_start_B1)
        whole_B = (lens_B == self.context_lens_B) & (lens_B >= shortest)
        return int(np.logical_and.accumulate(whole_B[::-1]).sum())


class PersistentBatch:
    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self._block_size = block_size
        self._rows: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._num_blocks_R = np.zeros(max_num_seqs, dtype=np.int32)
        self._prompt_lens_R = np.zeros(max_num_seqs, dtype=np.int64)
        self._tokens_RS = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.block_tables_RM = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)

    def row(self, seq_id: int) -> int:
        return self._rows[seq_id]

    def release(self, seq_id: int) -> int:
        row = self._rows.pop(seq_id)
        self._free.append(row)
        return row

    def admit(self, sequence: NewSequence) -> int:
        row = self._free.pop()
        self._rows[sequence.seq_id] = row
        self._num_blocks_R[row] = 0
        self._prompt_lens_R[row] = sequence.prompt_len
        self._tokens_RS[row, : len(sequence.token_ids)] = sequence.token_ids
        return row

    def targets(self, row: int, start: int, num_tokens: int) -> list[int]:
        """The tokens that positions start .. start + num_tokens - 1 predict, as far as the prompt goes."""
        stop = min(start + num_tokens + 1, int(self._prompt_lens_R[row]))
        targets: list[int] = self._tokens_RS[row, start + 1 : stop].tolist()
        return targets

    def step(self, batch: Batch) -> StepArrays:
        """Append the step's tokens and blocks to the rows, then lay the step out flat."""
        num_seqs = len(batch.scheduled)
        rows_B = np.empty(num_seqs, dtype=np.int32)
        starts_B = np.empty(num_seqs, dtype=np.int64)
        lens_B = np.empty(num_seqs, dtype=np.int64)
        for i, scheduled in enumerate(batch.scheduled):
            row = self._rows[scheduled.seq_id]
            rows_B[i], starts_B[i], lens_B[i] = row, scheduled.start, scheduled.num_tokens
            if new_tokens := scheduled.new_token_ids:
                end = scheduled.start + scheduled.num_tokens
                self._tokens_RS[row, end - len(new_tokens) : end] = new_tokens
            if new_blocks := scheduled.new_block_ids:
                held = self._num_blocks_R[row]
                self.block_tables_RM[row, held : held + len(new_blocks)] = new_blocks
                self._num_blocks_R[row] = held + len(new_blocks)
        query_start_B1 = np.zeros(num_seqs + 1, dtype=np.int32)
        np.cumsum(lens_B, out=query_start_B1[1:])
        rows_T = np.repeat(rows_B, lens_B)
        positions_T = np.arange(query_start_B1[-1]) + np.repeat(starts_B - query_start_B1[:-1], lens_B)
        blocks_T = self.block_tables_RM[rows_T, positions_T // self._block_size].astype(np.int64)
        return StepArrays(
            rows_B=rows_B,
            query_start_B1=query_start_B1,
            context_lens_B=(starts_B + lens_B).astype(np.int32),
            tokens_T=self._tokens_RS[rows_T, positions_T].astype(np.int64),
            positions_T=positions_T,
            slots_T=blocks_T * self._block_size + positions_T % self._block_size,
            rope_lengths_T=np.maximum(self._prompt_lens_R[rows_T], positions_T + 1),
        )
