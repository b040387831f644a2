"""Steps of a model runner laid out by hand; imports no transformers, so that ranks start fast."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.engine.model_runner import ModelRunner
from rayllm.models.checkpoint import Checkpoint
from rayllm.parallel.mesh import Mesh
from rayllm.scheduler.batch import Batch, NewSequence, PositionLogprobs, SamplerSpec, ScheduledSequence

PAGE = 4
SCORES_ALL = SamplerSpec(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, {}, 0, 0, [], None, [], 0, 1)

Step = Sequence[tuple[int, int, int]]  # (sequence, first position, tokens) of each part, in the order of the batch


def run_steps(
    directory: Path, tp: int, pp: int, sequences: Sequence[list[int]], steps: Sequence[Step], cache_dtype: str = "auto"
) -> dict[int, list[PositionLogprobs]]:
    """-> on the sampling rank, what each sequence's tokens but its first are scored at."""
    mesh = Mesh.single() if tp * pp == 1 else Mesh.from_world(tp, pp)
    runner = ModelRunner(
        Checkpoint.open(directory),
        mesh,
        EngineConfig(
            model=ModelConfig(model=str(directory)),
            cache=CacheConfig(block_size=PAGE, dtype=cache_dtype),
            scheduler=SchedulerConfig(max_num_seqs=len(sequences)),
        ),
        weight_version="w",
        max_model_len=max(map(len, sequences)),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    blocks = [-(-len(tokens) // PAGE) for tokens in sequences]
    runner.init_cache(sum(blocks))
    scores: dict[int, list[PositionLogprobs]] = {}
    for step_id, parts in enumerate(steps):
        admitted = [sequence for sequence, start, _ in parts if start == 0]
        scheduled = []
        for sequence, start, num_tokens in parts:
            mine = range(sum(blocks[:sequence]), sum(blocks[: sequence + 1]))
            new_blocks = list(reversed(mine)) if start == 0 else []
            scheduled.append(ScheduledSequence(sequence, start, num_tokens, [], new_blocks, False))
        new = [NewSequence(i, sequences[i], len(sequences[i]), SCORES_ALL) for i in admitted]
        result = runner.execute(Batch(step_id, [], new, scheduled, "w"))
        for answer in [] if result is None else result.sequences:
            assert answer.prompt_logprobs is not None
            scores.setdefault(answer.seq_id, []).extend(answer.prompt_logprobs)
    return scores
