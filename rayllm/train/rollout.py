"""Answers by the policy under training, drawn by the serving engine.

Each rank of the world holds the whole model for as long as it answers its share of the prompts, in the dtype of the
computation; what it answers does not depend on the others. Temperature 1, and nothing cut off: what the policy gives is
what is learnt from.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.core.errors import DivergedError
from rayllm.core.types import FinishReason, SamplingParams
from rayllm.engine.build import prepare
from rayllm.engine.llm import LLM
from rayllm.engine.outputs import RequestOutput
from rayllm.models.checkpoint import Checkpoint
from rayllm.train.config import TrainConfig
from rayllm.train.mesh import TrainMesh

_BLOCK = 16
_MAX_SEQS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Token ids of a prompt and what the policy wrote after it, with the log-probability that the engine gave each.
    `finished`: it ends with an end of sequence, and was not cut off."""

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    finished: bool


class Rollout:
    """`directory`: of the start model, whose configuration and tokenizer the policy has."""

    def __init__(self, directory: Path, config: TrainConfig, mesh: TrainMesh) -> None:
        self._directory, self._config, self._mesh = directory, config, mesh
        self._model_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))

    def __call__(self, weights: Mapping[str, Tensor], prompts: Sequence[list[int]], step: int) -> list[Answer]:
        """On every rank; all answers, in the order of the prompts, on each. `weights`: the whole model. An answer
        depends on the weights, `data.seed`, `step` and its place among the prompts."""
        rank, world = dist.get_rank(), dist.get_world_size()
        parts: list[list[Answer]] = [[] for _ in range(world)]
        dist.all_gather_object(parts, self._answer(weights, prompts, range(rank, len(prompts), world), step))
        return [parts[place % world][place // world] for place in range(len(prompts))]

    def _answer(
        self, weights: Mapping[str, Tensor], prompts: Sequence[list[int]], places: range, step: int
    ) -> list[Answer]:
        if not places:
            return []
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=self._config.ppo.answer_tokens,
                logprobs=0,
                seed=_seed(self._config.data.seed, step, place),
            )
            for place in places
        ]
        checkpoint = Checkpoint.held(self._directory, self._model_config, weights)
        with LLM.from_prepared(prepare(self._engine(len(places)), checkpoint)) as llm:
            return [_answered(output) for output in llm.generate([prompts[place] for place in places], params)]

    def _engine(self, requests: int) -> EngineConfig:
        """With pages for all sequences that run at once: none is ever preempted."""
        length = self._config.batch.sequence_length
        running = min(requests, _MAX_SEQS)
        return EngineConfig(
            model=ModelConfig(
                model=str(self._directory),
                dtype=self._config.model.compute_dtype,
                max_model_len=length,
                device=self._mesh.device.type,
            ),
            cache=CacheConfig(block_size=_BLOCK, num_blocks=running * (-(-length // _BLOCK) + 1)),
            scheduler=SchedulerConfig(max_num_seqs=running),
        )


def _answered(output: RequestOutput) -> Answer:
    [completion] = output.outputs
    if completion.finish_reason is FinishReason.ERROR:
        raise DivergedError("the policy gives no distribution to draw an answer from: training has diverged")
    return Answer(
        prompt=output.prompt_token_ids,
        tokens=completion.token_ids,
        log_probs=[said.logprob for said in completion.logprobs or ()],
        finished=completion.finish_reason is FinishReason.STOP,
    )


def _seed(seed: int, step: int, place: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
