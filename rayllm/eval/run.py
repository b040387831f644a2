"""All tasks of a run, one after another, and what is left in its folder. See `rayllm.eval.samples`."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayllm.eval.backend import Backend
from rayllm.eval.data import Data
from rayllm.eval.runner import EvalSettings, Progress, TaskResult, run_task
from rayllm.eval.samples import claim, read_spent, write_results, write_spent
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
    """-> what `results.json` holds, where it is written after each task. `loaded_as`: what was asked for that changes
    what the model answers. Seconds and tokens are those of all parts of a run that went on in its folder.

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
    account = _Account(backend, output)
    done: dict[str, Any] = {}

    def report() -> dict[str, Any]:
        return {**described, "limit": settings.limit, **account.spent(), "tasks": done}

    for task in tasks:
        result = run_task(task, backend, data, settings, output=output, progress=progress, on_flush=account.save)
        done[result.task] = result.as_json()
        if output is not None:
            account.save()
            write_results(output, report())
        on_done(result)
    return report()


class _Account:
    """What a run takes, on top of what its earlier parts in the same folder took."""

    def __init__(self, backend: Backend, output: Path | None) -> None:
        self._backend = backend
        self._output = output
        self._earlier = {} if output is None else read_spent(output)
        self._started = time.perf_counter()
        self._usage = backend.usage

    def spent(self) -> dict[str, Any]:
        """Tokens are None where the endpoint does not say."""
        spent: dict[str, Any] = {"seconds": self._earlier.get("seconds", 0.0) + time.perf_counter() - self._started}
        usage = self._backend.usage
        for name in ("prompt_tokens", "cached_tokens"):
            earlier = self._earlier.get(name, 0)
            known = usage is not None and self._usage is not None and earlier is not None
            spent[name] = earlier + getattr(usage, name) - getattr(self._usage, name) if known else None
        return spent

    def save(self) -> None:
        if self._output is not None:
            write_spent(self._output, self.spent())
