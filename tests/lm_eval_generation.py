"""Generation tasks here and in lm-eval 0.4.13: the same documents for both, and the scores of both in one shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayllm.eval.answers import numbers
from rayllm.eval.data import Data
from rayllm.eval.registry import find_task
from rayllm.eval.task import Document, Generated, Task
from rayllm.eval.tasks.math_data import SUBJECTS
from tests.eval_runs import write_table
from tests.lm_eval_reference import data_folder, tables_of
from tests.lm_eval_replay import Judged

CONFIGS = {
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "humaneval_instruct": "humaneval/humaneval_instruct.yaml",
    "mbpp": "mbpp/mbpp.yaml",
    **{
        f"{family}_{subject}": f"{family}/{family}_{subject}.yaml"
        for family in ("hendrycks_math", "minerva_math")
        for subject in SUBJECTS
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`extracted`: by filter, as lm-eval names them; empty where lm-eval extracts nothing that it shows."""

    extracted: Mapping[str, str]
    values: Mapping[str, float]


def load(name: str, folder: Path, limit: int | None = None) -> tuple[Task, list[Document], dict[str, Path]]:
    """The task, its documents, and the files below `folder` from which lm-eval reads the same ones."""
    task = find_task(name)
    documents = list(task.documents(Data(data_folder())))[:limit]
    table = tables_of(name)[0]
    rows = [{column: document.fields[column] for column in table.columns} for document in documents]
    path = write_table(folder, table, rows)
    return task, documents, {"test": path, "train": path}


def verdict_of(task: Task, document: Document, text: str) -> Verdict:
    score = task.score(document, [Generated(texts=(text,))])
    extracted: dict[str, str] = {}
    if task.name == "gsm8k_cot":
        assert score.extracted is not None
        strict = numbers.first_number(text, numbers.SENTENCE)
        extracted = {"strict-match": strict, "flexible-extract": score.extracted}
    elif task.runs_code:
        assert score.extracted is not None
        extracted = {"program": score.extracted}
    return Verdict(extracted=extracted, values=dict(score.values))


def verdict_of_lm_eval(task: Task, judged: Judged) -> Verdict:
    """With our names: lm-eval has a metric for each of gsm8k's filters, and calls MBPP's otherwise."""
    if task.name == "gsm8k_cot":
        values = {name: judged.metrics[name]["exact_match"] for name in task.metrics}
        return Verdict(extracted=dict(judged.extracted), values=values)
    if not task.runs_code:
        return Verdict(extracted={}, values=dict(judged.metrics["none"]))
    (program,) = judged.extracted.get("create_test") or [judged.extracted["none"]]
    values = dict(judged.metrics.get("create_test") or {"pass@1": judged.metrics["none"]["pass_at_1"]})
    return Verdict(extracted={"program": program}, values=values)
