"""All tasks of a run, one after another, and what is left in its folder. See `rayllm.eval.samples`."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayllm.eval.backend import Backend
from rayllm.eval.data import Data
from rayllm.eval.runner import EvalSettings, Progress, TaskResult, run_task
from rayllm.eval.samples import claim, write_results
from rayllm.eval.task import Task


def run_tasks(
    tasks: Sequence[Task],
    backend: Backend,
    loaded_as: Mapping[str, Any],
    data: Data,
    settings: EvalSettings,
    *,
    output: Path | None = None,
    progress: Progress,
    on_done: Callable[[TaskResult], None] = lambda result: None,
) -> dict[str, Any]:
    """-> what `results.json` holds. `loaded_as`: what was asked for that changes what the model answers.

    Raises as `run_task` does, and ConfigError where `output` holds another run.
    """
    described = {
        "model": backend.model,
        "weight_version": backend.weight_version,
        **loaded_as,
        "num_fewshot": settings.num_fewshot,
        "seed": settings.seed,
    }
    if output is not None:
        claim(output, described)
    results: list[TaskResult] = []
    started = time.perf_counter()
    for task in tasks:
        results.append(run_task(task, backend, data, settings, output=output, progress=progress))
        on_done(results[-1])
    usage = backend.usage
    report = {
        **described,
        "limit": settings.limit,
        "seconds": time.perf_counter() - started,
        "prompt_tokens": None if usage is None else usage.prompt_tokens,
        "cached_tokens": None if usage is None else usage.cached_tokens,
        "tasks": {result.task: result.as_json() for result in results},
    }
    if output is not None:
        write_results(output, report)
    return report
