"""The model under training, evaluated as `rayllm eval` would: by the serving engine, task by task.

Every rank holds the whole model for as long as it answers its share of the requests; all of them hear all answers. Rank
0 leaves in RUN/evaluations/step-00000100 what `rayllm eval --output` leaves, for `rayllm eval report` to compare.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from rayllm.core.config import CacheConfig, EngineConfig
from rayllm.core.config import ModelConfig as EngineModelConfig
from rayllm.core.errors import ConfigError
from rayllm.eval.backend import Backend, OnResponse, Usage
from rayllm.eval.data import Data
from rayllm.eval.local_backend import LocalBackend
from rayllm.eval.registry import find_task
from rayllm.eval.run import run_tasks
from rayllm.eval.runner import EvalSettings, check_task
from rayllm.eval.task import Request, Response, Task
from rayllm.models.checkpoint import Checkpoint
from rayllm.train.config import EvaluationConfig, TrainConfig
from rayllm.train.gather import language_model
from rayllm.train.mesh import TrainMesh
from rayllm.train.trainee import Heads, Trainee

_BLOCK = 16
_LEAST_CACHED = 8192  # tokens: what documents with a common beginning, and answers beside each other, share


def check_evaluation(config: EvaluationConfig, heads: Heads) -> None:
    """ConfigError or DataError for what could not be evaluated."""
    tasks = _tasks(config)
    if tasks and heads is Heads.SCORE:
        raise ConfigError("evaluation: a reward model writes no text, so no task can be asked of it")
    for task in tasks:
        if task.runs_code:
            raise ConfigError(
                f"evaluation.tasks: {task.name} runs programs that the model writes, which training does not do;"
                " evaluate the checkpoints with `rayllm eval`"
            )
        check_task(task, _data(config), _settings(config))


class Evaluation:
    """`directory`: of the start model, whose configuration and tokenizer the trained one has."""

    def __init__(self, config: TrainConfig, directory: Path, trainee: Trainee, mesh: TrainMesh) -> None:
        self._config, self._directory, self._trainee, self._mesh = config, directory, trainee, mesh
        self._model_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self._tasks = _tasks(config.evaluation)

    def is_due(self, step: int) -> bool:
        """After so many steps."""
        every = self._config.evaluation.every_steps
        ends = step in (0, self._config.schedule.steps)
        return bool(self._tasks) and (ends or (every > 0 and step % every == 0))

    def __call__(self, step: int) -> dict[str, float]:
        """On every rank. -> the metrics of whole tasks that are finite, as TASK.METRIC."""
        output = None
        if dist.get_rank() == 0:
            output = Path(self._config.run) / "evaluations" / f"step-{step:08d}"
            shutil.rmtree(output, ignore_errors=True)  # of an attempt that went further than its last checkpoint
        weights = language_model(self._trainee, self._mesh, self._config.model.compute_dtype)
        checkpoint = Checkpoint.held(self._directory, self._model_config, weights)
        own = LocalBackend.of_held(self._engine(checkpoint), checkpoint, f"step-{step:08d}")
        del weights, checkpoint  # the engine has its own
        try:
            report = run_tasks(
                self._tasks,
                _Shared(own),
                {"dtype": self._config.model.compute_dtype},
                _data(self._config.evaluation),
                _settings(self._config.evaluation),
                output=output,
                progress=_unseen,
            )
        finally:
            own.close()
        return {
            f"{task}.{name}": metric["value"]
            for task, result in report["tasks"].items()
            for name, metric in result["metrics"].items()
            if metric["value"] is not None
        }

    def _engine(self, checkpoint: Checkpoint) -> EngineConfig:
        tokens = max(checkpoint.spec.max_position_embeddings + 1, _LEAST_CACHED)
        return EngineConfig(
            model=EngineModelConfig(
                model=self._config.run, dtype=self._config.model.compute_dtype, device=self._mesh.device.type
            ),
            cache=CacheConfig(block_size=_BLOCK, num_blocks=-(-tokens // _BLOCK) + 1),
        )


class _Shared(Backend):
    """Each rank has its own backend answer a part of the requests, which lie together: neighbours share beginnings."""

    def __init__(self, own: Backend) -> None:
        self._own = own
        self.model, self.weight_version = own.model, own.weight_version

    @property
    def usage(self) -> Usage | None:
        """Of this rank."""
        return self._own.usage

    def run(self, requests: Sequence[Request], seeds: Sequence[int], on_response: OnResponse) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        share = -(-len(requests) // world)
        first = share * rank
        answered: list[tuple[int, Response]] = []
        self._own.run(
            requests[first : first + share],
            seeds[first : first + share],
            lambda index, response: answered.append((first + index, response)),
        )
        parts: list[list[tuple[int, Response]]] = [[] for _ in range(world)]
        dist.all_gather_object(parts, answered)
        for part in parts:
            for index, response in part:
                on_response(index, response)

    def close(self) -> None:
        self._own.close()


def _tasks(config: EvaluationConfig) -> list[Task]:
    return [find_task(name) for name in config.tasks]


def _data(config: EvaluationConfig) -> Data:
    return Data(Path(config.data) if config.data else None)


def _settings(config: EvaluationConfig) -> EvalSettings:
    return EvalSettings(num_fewshot=config.num_fewshot, limit=config.limit)


@contextmanager
def _unseen(what: str, steps: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None
