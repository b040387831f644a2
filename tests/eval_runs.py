"""Runs of tasks as the tests make them: silent, and with their rows at hand."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rayllm.eval.backend import Backend
from rayllm.eval.data import Data, Row, Table
from rayllm.eval.registry import find_task
from rayllm.eval.runner import EvalSettings, TaskResult, run_task
from rayllm.eval.samples import SampleStore
from rayllm.eval.task import Task


def run(task: str | Task, backend: Backend, data: Data, output: Path | None = None, **settings: Any) -> TaskResult:
    found = find_task(task) if isinstance(task, str) else task
    return run_task(
        found,
        backend,
        data,
        EvalSettings(**settings),
        output=output,
        progress=lambda description, total: nullcontext(lambda steps: None),
    )


def rows(output: Path, task: str) -> list[dict[str, Any]]:
    """In the order of the documents."""
    return sorted(SampleStore(output, task).rows(), key=lambda row: (row["subject"], row["index"]))


def answers(output: Path, task: str) -> list[tuple[str | None, list[float]]]:
    """Of each document what was read out of the responses, and their log-probabilities."""
    return [(row["extracted"], [response["logprob"] for response in row["responses"]]) for row in rows(output, task)]


def write_table(folder: Path, table: Table, rows: list[Row]) -> Path:
    """Laid out as the hub's Parquet conversion is, in JSON Lines."""
    path = folder / table.name / (table.config or "default") / table.split / "0000.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
