"""One task from documents to metrics: prompts, responses, scores, rows.

What is scored already, in the folder of the run, is not run again. Answers are scored in threads while the engine goes
on with the rest.
"""

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rayllm.core.errors import ConfigError, DataError
from rayllm.eval.backend import Backend
from rayllm.eval.data import Data
from rayllm.eval.record import RunInfo, is_asked_by, make_row, score_of
from rayllm.eval.samples import SampleStore
from rayllm.eval.task import Document, Metric, Request, Response, Score, Scored, ShotOrder, Task, choose_shots

# Of one call of the backend: bounds what is held in memory; each call ends with the engine running empty.
_REQUESTS_PER_CALL = 8192

# (what is done, how many steps) -> a context in which each call reports some of them as done
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
_Key = tuple[str, int]  # subject and index of a document


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """`limit`: the first documents of each subject. `num_fewshot` None: what the task says."""

    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 0
    allow_code_execution: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    task: str
    version: str
    num_fewshot: int
    num_documents: int
    num_resumed: int  # of them scored by an earlier run in the same folder
    metrics: Sequence[Metric]
    limit: int | None = None  # the settings'
    environment: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        groups: dict[str, dict[str, Any]] = {}
        for metric in self.metrics:
            group = groups.setdefault(metric.group, {"num_documents": metric.num_documents, "metrics": {}})
            group["metrics"][metric.name] = _as_json(metric)
        return {
            "version": self.version,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "num_resumed": self.num_resumed,
            "environment": dict(self.environment),
            **groups.pop("", {"num_documents": self.num_documents, "metrics": {}}),
            "groups": groups,
        }


def _as_json(metric: Metric) -> dict[str, Any]:
    """JSON has no infinity: `value` is null then, and a `note` says why."""
    if math.isfinite(metric.value):
        return {"value": metric.value, "stderr": metric.stderr}
    return {"value": None, "stderr": None, "note": f"{metric.value}: no finite number"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    document: Document
    requests: Sequence[Request]
    seed: int


def check_task(task: Task, data: Data, settings: EvalSettings) -> None:
    """Raises what `run_task` would raise without asking the model anything: before a large one is loaded, say."""
    task.check_permission(allow_code_execution=settings.allow_code_execution)
    documents = _first_of_each_subject(task.documents(data), settings.limit)
    pool = _shot_pool(task, documents, data, _num_fewshot(task, settings))
    for document in documents:
        _check_row(task, document, task.try_out)
    for shot in chain.from_iterable(pool.values()):
        _check_row(task, shot, task.example)


def _check_row(task: Task, document: Document, make: Callable[[Document], object]) -> None:
    """DataError where the row's columns hold what the task can make no use of: an answer among four that is the 7th."""
    try:
        make(document)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        source = document.source or f"document {document.index} of {document.subject or task.name}"
        raise DataError(f"{source}: is no row of {task.name} ({type(error).__name__}: {error})") from error


def run_task(
    task: Task,
    backend: Backend,
    data: Data,
    settings: EvalSettings,
    *,
    output: Path | None = None,
    progress: Progress,
    on_flush: Callable[[], None] = lambda: None,
) -> TaskResult:
    """`on_flush` is called when rows have been written.

    Raises DataError for data that is missing, ConfigError for what cannot be run."""
    task.check_permission(allow_code_execution=settings.allow_code_execution)
    documents = _first_of_each_subject(task.documents(data), settings.limit)
    num_fewshot = _num_fewshot(task, settings)
    items = _items(task, documents, data, num_fewshot, settings.seed)
    store = SampleStore(output, task.name, on_flush)
    scores = _scores_so_far(store, task, items)
    missing = [item for item in items if _key(item.document) not in scores]
    info = RunInfo(
        model=backend.model, weight_version=backend.weight_version, num_fewshot=num_fewshot, seed=settings.seed
    )
    num_resumed = len(items) - len(missing)
    with progress(task.name, len(items)) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        advance(num_resumed)

        def keep(item: _Item, responses: Sequence[Response], score: Score) -> None:
            store.add(make_row(task, item.document, item.requests, responses, score, info))
            scores[_key(item.document)] = score
            advance(1)

        try:
            for batch in _batches(missing):
                scorer = _Scorer(task, batch, pool, keep)
                seeds = [item.seed for item in batch for _ in item.requests]
                backend.run([request for item in batch for request in item.requests], seeds, scorer.take)
                scorer.finish()
        finally:
            store.flush()
    scored: list[Scored] = [(document, scores[_key(document)]) for document in documents]
    return TaskResult(
        task=task.name,
        version=task.version,
        num_fewshot=num_fewshot,
        num_documents=len(documents),
        limit=settings.limit,
        num_resumed=num_resumed,
        metrics=task.aggregate(scored),
        environment=task.environment(),
    )


class _Scorer:
    """Puts the responses of each document together and has it scored; `keep` hears of each, in this thread."""

    def __init__(
        self,
        task: Task,
        items: Sequence[_Item],
        pool: ThreadPoolExecutor,
        keep: Callable[[_Item, Sequence[Response], Score], None],
    ) -> None:
        self._task = task
        self._items = items
        self._pool = pool
        self._keep = keep
        self._owners = [(i, j) for i, item in enumerate(items) for j in range(len(item.requests))]
        self._responses: list[dict[int, Response]] = [{} for _ in items]
        self._pending: deque[tuple[_Item, Sequence[Response], Future[Score]]] = deque()

    def take(self, index: int, response: Response) -> None:
        owner, place = self._owners[index]
        item, responses = self._items[owner], self._responses[owner]
        responses[place] = response
        if len(responses) == len(item.requests):
            ordered = [responses[place] for place in range(len(responses))]
            responses.clear()
            self._pending.append((item, ordered, self._pool.submit(self._task.score, item.document, ordered)))
        while self._pending and self._pending[0][2].done():
            self._hand_on()

    def finish(self) -> None:
        while self._pending:
            self._hand_on()

    def _hand_on(self) -> None:
        item, responses, score = self._pending.popleft()
        self._keep(item, responses, score.result())


def _num_fewshot(task: Task, settings: EvalSettings) -> int:
    return task.num_fewshot if settings.num_fewshot is None else settings.num_fewshot


def _shot_pool(
    task: Task, documents: Sequence[Document], data: Data, num_fewshot: int
) -> Mapping[str, Sequence[Document]]:
    """By subject, and enough for each of them."""
    pool: Mapping[str, Sequence[Document]] = task.shots(data) if num_fewshot else {}
    spare = 1 if task.shot_order is ShotOrder.RANDOM_OTHERS else 0
    for subject in sorted({document.subject for document in documents} if num_fewshot else ()):
        available = max(0, len(pool.get(subject, ())) - spare)
        if available < num_fewshot:
            of_what = f" of {subject}" if subject else ""
            raise ConfigError(f"{task.name}: {num_fewshot} shots are asked for, but there are {available}{of_what}")
    return pool


def _items(task: Task, documents: Sequence[Document], data: Data, num_fewshot: int, seed: int) -> list[_Item]:
    pool = _shot_pool(task, documents, data, num_fewshot)
    shots = choose_shots(documents, pool, num_fewshot, task.shot_order)
    return [
        _Item(
            document=document,
            requests=task.requests(document, task.prompt(document, chosen)),
            seed=_document_seed(seed, task.name, document),
        )
        for document, chosen in zip(documents, shots, strict=True)
    ]


def _scores_so_far(store: SampleStore, task: Task, items: Sequence[_Item]) -> dict[_Key, Score]:
    """Raises ConfigError where the rows are not of this task as it is now and of these documents and shots."""
    scores: dict[_Key, Score] = {}
    by_key = {_key(item.document): item for item in items}
    for row in store.rows():
        key = (row["subject"], row["index"])
        item = by_key.get(key)
        same = item is None or (row["target"] == task.target(item.document) and is_asked_by(row, item.requests))
        if row["task_version"] != task.version or not same:
            raise ConfigError(
                f"the output folder holds samples of {task.name} that another version of it, or other data, has given; "
                "choose another --output"
            )
        scores[key] = score_of(row)
    return scores


def _document_seed(seed: int, task: str, document: Document) -> int:
    """Of a document's own, so that its samples do not depend on which others are run."""
    text = f"{seed}/{task}/{document.subject}/{document.index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _first_of_each_subject(documents: Sequence[Document], limit: int | None) -> list[Document]:
    return [document for document in documents if limit is None or document.index < limit]


def _batches(items: Sequence[_Item]) -> list[list[_Item]]:
    batches: list[list[_Item]] = []
    room = 0
    for item in items:
        if len(item.requests) > room:
            batches.append([])
            room = _REQUESTS_PER_CALL
        batches[-1].append(item)
        room -= len(item.requests)
    return batches


def _key(document: Document) -> _Key:
    return document.subject, document.index
