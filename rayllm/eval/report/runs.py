"""The runs that a report compares, as `rayllm eval --output` left them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rayllm.core.errors import ConfigError
from rayllm.eval.samples import SampleStore

Row = dict[str, Any]
Key = tuple[str, int]  # subject and index of a document
_SHOWN_ANYWAY = ("model", "weight_version", "seed")
_OUTCOME = ("tasks", "seconds", "prompt_tokens", "cached_tokens")
_FIGURE = ("value", "stderr")
MAX_RUNS = 6  # as many colours as can be told apart


@dataclass(frozen=True, kw_only=True)
class Run:
    """`letter` names it in the report."""

    letter: str
    directory: Path
    info: Mapping[str, Any]  # of results.json
    tasks: Mapping[str, Mapping[str, Any]]

    @property
    def title(self) -> str:
        return f"{self.letter}: {self.info['model']}"

    @cached_property
    def _rows(self) -> dict[str, dict[Key, Row]]:
        return {}

    def rows(self, task: str) -> Mapping[Key, Row]:
        """By document, those that the metrics are of: the folder may hold samples beyond the limit of its last run.
        Empty where the run has not done the task."""
        if task not in self._rows:
            rows = SampleStore(self.directory, task).rows() if task in self.tasks else ()
            limit = self.tasks[task].get("limit") if task in self.tasks else None
            found = {(row["subject"], row["index"]): row for row in rows}
            self._rows[task] = {key: row for key, row in found.items() if limit is None or key[1] < limit}
        return self._rows[task]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """ConfigError for a folder that holds no finished run, and for more runs than a page can show."""
    if not directories:
        raise ConfigError("name the folders of one or more runs")
    if len(directories) > MAX_RUNS:
        raise ConfigError(f"{len(directories)} runs are too many to compare on one page; name at most {MAX_RUNS}")
    return [_read(letter, directory) for letter, directory in zip(ascii_uppercase, directories, strict=False)]


def _read(letter: str, directory: Path) -> Run:
    path = directory / "results.json"
    if not path.is_file():
        raise ConfigError(
            f"{directory}: holds no results.json; give the --output folder of a run of `rayllm eval` that has finished"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(content["model"], str) and all(map(_is_result, content["tasks"].values()))):
            raise ValueError("something else")
        return Run(letter=letter, directory=directory, info=content, tasks=content["tasks"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: is not what `rayllm eval` writes") from error


def _is_result(result: Mapping[str, Any]) -> bool:
    """Raises LookupError, TypeError or AttributeError for some of what is none."""
    parts = [result, *result["groups"].values()]
    figures = [figure for part in parts for figure in part["metrics"].values()]
    numbers = [result.get("limit"), *(part["num_documents"] for part in parts)]
    numbers += [figure[name] for figure in figures for name in _FIGURE]
    settled = isinstance(result["version"], str) and isinstance(result["num_fewshot"], int)
    return bool(result["metrics"]) and settled and all(n is None or isinstance(n, int | float) for n in numbers)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The settings in which the runs differ, besides those that every report shows."""
    names = dict.fromkeys(name for run in runs for name in run.info)
    return [
        name
        for name in names
        if name not in (*_SHOWN_ANYWAY, *_OUTCOME) and any(run.info.get(name) != runs[0].info.get(name) for run in runs)
    ]


def task_names(runs: Sequence[Run]) -> list[str]:
    """Of all runs, in the order in which they come up."""
    return list(dict.fromkeys(name for run in runs for name in run.tasks))
