"""The flat arrays of a step against a plain loop over its sequences."""

import numpy as np

from rayllm.engine.persistent_batch import PersistentBatch, StepArrays
from rayllm.scheduler.batch import Batch, NewSequence, SamplerSpec, ScheduledSequence

SAMPLER = SamplerSpec(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, {}, 0, 0, [], None, [], None, 0)


def test_mixed_prefill_and_decode():
    rows = PersistentBatch(max_num_seqs=3, max_model_len=20, block_size=4)
    for seq_id, tokens in [(10, [1, 2, 3, 4, 5, 6, 7]), (11, [8, 9]), (12, [5])]:
        rows.admit(NewSequence(seq_id, tokens, len(tokens), SAMPLER))
    rows.step(
        Batch(
            0,
            [],
            [],
            [
                ScheduledSequence(10, 0, 3, [], [6], False),
                ScheduledSequence(11, 0, 2, [], [2], True),
                ScheduledSequence(12, 0, 1, [], [9], True),
            ],
            "w",
        )
    )
    rows.release(12)
    arrays = rows.step(
        Batch(1, [], [], [ScheduledSequence(11, 2, 1, [77], [], True), ScheduledSequence(10, 3, 4, [], [0], True)], "w")
    )
    assert arrays.tokens_T.tolist() == [77, 4, 5, 6, 7]
    assert arrays.positions_T.tolist() == [2, 3, 4, 5, 6]
    assert arrays.slots_T.tolist() == [2 * 4 + 2, 6 * 4 + 3, 0, 1, 2]
    assert arrays.query_start_B1.tolist() == [0, 1, 5]
    assert arrays.context_lens_B.tolist() == [3, 7]
    assert arrays.rope_lengths_T.tolist() == [3, 7, 7, 7, 7]
    assert rows.block_tables_RM[arrays.rows_B[1], :2].tolist() == [6, 0]
    assert rows.targets(rows.row(10), 3, 4) == [5, 6, 7]
    assert rows.targets(rows.row(10), 0, 3) == [2, 3, 4]
    assert rows.targets(rows.row(11), 2, 1) == []


def test_a_row_is_reused_after_its_release():
    rows = PersistentBatch(max_num_seqs=1, max_model_len=8, block_size=2)
    rows.admit(NewSequence(1, [1, 2, 3], 3, SAMPLER))
    rows.step(Batch(0, [], [], [ScheduledSequence(1, 0, 3, [], [3, 1], True)], "w"))
    assert rows.release(1) == rows.admit(NewSequence(2, [4], 1, SAMPLER))
    arrays = rows.step(Batch(1, [1], [], [ScheduledSequence(2, 0, 1, [], [5], True)], "w"))
    assert arrays.slots_T.tolist() == [10]
    assert arrays.tokens_T.dtype == np.int64


def test_prompts_at_the_end_of_a_step():
    """A decode, a chunk of a longer prompt, and whole contexts of 1, 5, 4 and 6 tokens."""
    lens, contexts = np.array([1, 3, 1, 5, 4, 6]), np.array([9, 7, 1, 5, 4, 6])
    unused = np.zeros(0, dtype=np.int64)
    arrays = StepArrays(
        rows_B=np.arange(6, dtype=np.int32),
        query_start_B1=np.concatenate([[0], lens.cumsum()]).astype(np.int32),
        context_lens_B=contexts.astype(np.int32),
        tokens_T=unused,
        positions_T=unused,
        slots_T=unused,
        rope_lengths_T=unused,
    )
    assert [arrays.num_prompts(shortest) for shortest in (1, 2, 4, 5, 6, 7)] == [4, 3, 3, 1, 1, 0]
