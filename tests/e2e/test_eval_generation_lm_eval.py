"""Generation tasks against lm-eval 0.4.13 itself: the same prompts byte for byte, the same scores of the same texts.

The texts are right and wrong answers written from the data, and those of SmolLM2-135M-Instruct.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig
from rayllm.eval.answers import minerva
from rayllm.eval.answers.boxed import last_boxed
from rayllm.eval.data import Data
from rayllm.eval.local_backend import LocalBackend
from rayllm.eval.registry import find_task
from rayllm.eval.task import Document, Generate, Generated, Task, choose_shots
from rayllm.eval.tasks import kmmlu
from rayllm.eval.tasks.math_data import SUBJECTS
from rayllm.models.hub import resolve_model
from tests import eval_runs
from tests.eval_runs import write_table
from tests.lm_eval_generation import CONFIGS, load, verdict_of, verdict_of_lm_eval
from tests.lm_eval_reference import LmEval, data_folder, tables_of
from tests.lm_eval_replay import Judged, asked, judged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

GOLDEN = Path(__file__).parents[1] / "golden" / "generation.json"


def our_requests(task: Task, documents: Sequence[Document]) -> list[Generate]:
    pool = task.shots(Data(data_folder())) if task.num_fewshot else {}
    chosen_shots = choose_shots(documents, pool, task.num_fewshot, task.shot_order)
    requests = []
    for document, chosen in zip(documents, chosen_shots, strict=True):
        (request,) = task.requests(document, task.prompt(document, chosen))
        assert isinstance(request, Generate)
        requests.append(request)
    return requests


@pytest.mark.parametrize("name", CONFIGS)
def test_every_prompt_is_the_same(name: str, tmp_path: Path) -> None:
    task, documents, files = load(name, tmp_path / "data")
    ours = our_requests(task, documents)
    theirs = asked(tmp_path, CONFIGS[name], files)
    assert len(ours) == len(theirs) > 100
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine.prompt, str)
        assert mine.prompt + mine.prefix == other.prompt
        assert mine.until == other.until
        assert mine.max_tokens == (other.max_tokens or 256)
        assert (mine.temperature > 0) == other.do_sample


def test_random_shots_are_drawn_alike(tmp_path: Path) -> None:
    """The training set is not in the package: the last documents of the test set stand in for it, on both sides."""
    task = find_task("gsm8k")
    tested, shown = tables_of("gsm8k")
    rows = [{column: row[column] for column in tested.columns} for row in Data(data_folder()).rows(tested)]
    data = tmp_path / "data"
    files = {"test": write_table(data, tested, rows[:300]), "train": write_table(data, shown, rows[300:])}
    documents, pool = task.documents(Data(data)), task.shots(Data(data))
    chosen = choose_shots(documents, pool, task.num_fewshot, task.shot_order)
    prompts = [task.prompt(document, shots) for document, shots in zip(documents, chosen, strict=True)]
    assert prompts == [each.prompt for each in asked(tmp_path, "gsm8k/gsm8k.yaml", files)]


def reasoning_written(document: Document, i: int) -> str:
    gold = "ABCD"[int(document.fields["answer"]) - 1]
    ways = (
        f" 따라서, 정답은 ({gold}) 입니다.",
        f" 정답은 {gold}입니다. 아니, 정답은 (A) 입니다.",
        f" 정답은 {gold}) {document.fields[gold]} 입니다!",
        f" 정답은  ({gold.lower()}) 입니다.",
        f" 정답은 ({gold})",
        f" 정답은\n({gold}) 아마\n입니다.",
        f" 정답은 무엇일까요? 정답은 ({gold}) 입니다",
        " 정답은 (A), (B) 중 하나입니다.",
        f"{gold}",
        "",
    )
    return ways[i % len(ways)]


@pytest.mark.parametrize("subject", kmmlu.GROUP_OF)
def test_kmmlu_cot_hard(subject: str, tmp_path: Path) -> None:
    """The hard questions are on the hub alone: the 225 that lm-eval carries stand in for them, in the same columns."""
    file_name = subject.lower().replace("-", "_")
    name, config = f"kmmlu_cot_hard_{file_name}", f"kmmlu/cot_hard/kmmlu_cot_hard_{file_name}.yaml"
    task = find_task(name)
    questions = find_task(f"kmmlu_dev_{file_name}").documents(Data(None))
    rows = [{column: document.fields[column] for column in kmmlu.COLUMNS} for document in questions] * 2
    path = write_table(tmp_path / "data", tables_of(name)[0], rows)
    data, files = Data(tmp_path / "data"), {"test": path, "dev": path}
    documents, pool = task.documents(data), task.shots(data)
    theirs = asked(tmp_path, config, files)
    (tmp_path / "configs" / "reference.yaml").unlink()
    (tmp_path / "configs").rmdir()
    chosen = choose_shots(documents, pool, task.num_fewshot, task.shot_order)
    for document, shots, other in zip(documents, chosen, theirs, strict=True):
        (request,) = task.requests(document, task.prompt(document, shots))
        assert isinstance(request, Generate)
        assert request.prompt == other.prompt
        assert (request.until, request.max_tokens, request.temperature) == (other.until, other.max_tokens, 0.0)
        assert not other.do_sample
    texts = [reasoning_written(document, i) for i, document in enumerate(documents)]
    verdicts = judged(tmp_path, config, files, texts)
    scores = [task.score(document, [Generated(texts=(text,))]) for document, text in zip(documents, texts, strict=True)]
    assert [score.extracted for score in scores] == [each.extracted["get-answer"] for each in verdicts]
    assert [score.values for score in scores] == [each.metrics["get-answer"] for each in verdicts]


def numbers_written(document: Document, i: int) -> str:
    gold = document.fields["answer"].rpartition("#### ")[2]
    ways = (
        document.fields["answer"],
        f" So the total is 7. The answer is {gold}.",
        f" That makes ${gold}",
        f" The answer is {gold}0. No: {gold}.00",
        f" Well, {gold} dollars, or 12,000.5 of them.",
        " I do not know ...",
    )
    return ways[i % len(ways)]


def mathematics_written(document: Document, i: int) -> str:
    solution = document.fields["solution"]
    answer = last_boxed(solution) or ""
    sentence = " Final Answer: The final answer is ${}$. I hope it is correct."
    ways = (
        solution,
        solution + "\n" + sentence.format(answer),
        sentence.format(answer.replace("frac", "dfrac").replace(" ", "")),
        sentence.format(f"x = {answer}"),
        sentence.format(f"{answer} + 0"),
        sentence.format("1 + 1/3"),
        f" The answer is ${answer}$.",
        f" {answer}",
        rf" \boxed{{{answer} \text{{ cm}}}}",
        f" It is ${answer}$, or ${answer}1$",
    )
    return ways[i % len(ways)]


def programs_written(document: Document, i: int) -> str:
    fields = document.fields
    code = fields["canonical_solution"] if "canonical_solution" in fields else fields["code"]
    ways = (
        code,
        re.sub(r"return .+", "return None", code),
        code + "\n```\nThat is all.",
        "    return 0\n",
        code + " 1x",
    )
    return ways[i % len(ways)]


WRITTEN: dict[str, tuple[Callable[[Document, int], str], int]] = {
    "gsm8k_cot": (numbers_written, 600),
    "humaneval": (programs_written, 164),
    "humaneval_instruct": (programs_written, 164),
    "mbpp": (programs_written, 150),
    **{f"hendrycks_math_{subject}": (mathematics_written, 200) for subject in SUBJECTS},
    **{f"minerva_math_{subject}": (mathematics_written, 40) for subject in SUBJECTS},
}


def compare(task: Task, documents: Sequence[Document], texts: Sequence[str], theirs: Sequence[Judged]) -> int:
    """How many documents were right in the first metric. Any difference fails."""
    ours = [verdict_of(task, document, text) for document, text in zip(documents, texts, strict=True)]
    differing = [
        (document.index, text, mine, verdict_of_lm_eval(task, other))
        for document, text, mine, other in zip(documents, texts, ours, theirs, strict=True)
        if mine != verdict_of_lm_eval(task, other)
    ]
    assert differing == []
    return sum(verdict.values[task.metrics[0]] > 0 for verdict in ours)


@pytest.mark.parametrize("name", WRITTEN)
def test_written_answers_score_the_same(name: str, tmp_path: Path) -> None:
    write, limit = WRITTEN[name]
    task, documents, files = load(name, tmp_path / "data", limit)
    texts = [write(document, i) for i, document in enumerate(documents)]
    right = compare(task, documents, texts, judged(tmp_path, CONFIGS[name], files, texts))
    print(f"{name}: {len(documents)} documents, {right} right in both")
    assert 0.1 < right / len(documents) < 0.9  # so the comparison is one of right and of wrong answers


def test_a_normal_form_is_the_same_for_every_solution() -> None:
    from lm_eval.tasks.minerva_math import utils as lm_eval_minerva

    for subject in SUBJECTS:
        for document in find_task(f"minerva_math_{subject}").documents(Data(data_folder())):
            answer = last_boxed(document.fields["solution"])
            assert answer is not None
            assert minerva.normalize(answer) == lm_eval_minerva.normalize_final_answer(answer)


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def backend(model: Path) -> Iterator[LocalBackend]:
    config = EngineConfig(
        model=ModelConfig(model=str(model), dtype="float32"), cache=CacheConfig(cpu_memory_bytes=1 << 30)
    )
    backend = LocalBackend.open(config)
    yield backend
    backend.close()


GENERATED = {
    "gsm8k_cot": 100,
    "humaneval": 100,
    **{f"{family}_{subject}": 15 for family in ("hendrycks_math", "minerva_math") for subject in SUBJECTS},
}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_answers_score_the_same(name: str, backend: LocalBackend, tmp_path: Path) -> None:
    task, documents, files = load(name, tmp_path / "data", GENERATED[name])
    result = eval_runs.run(name, backend, Data(tmp_path / "data"), tmp_path / "run", allow_code_execution=True)
    rows = eval_runs.rows(tmp_path / "run", name)
    texts = [row["responses"][0]["text"] for row in rows]
    theirs = judged(tmp_path, CONFIGS[name], files, texts)
    right = compare(task, documents, texts, theirs)
    assert result.metrics[0].value * len(documents) == pytest.approx(right)


@pytest.mark.parametrize("name", ["gsm8k_cot", "hendrycks_math_algebra", "minerva_math_algebra"])
def test_generated_texts_are_the_same(name: str, backend: LocalBackend, model: Path, tmp_path: Path) -> None:
    """lm-eval generates through transformers, one document at a time."""
    _, documents, files = load(name, tmp_path / "data", 8)
    eval_runs.run(name, backend, Data(tmp_path / "data"), tmp_path / "run")
    ours = [row["responses"][0]["text"] for row in eval_runs.rows(tmp_path / "run", name)]
    theirs = LmEval(model, batch_size=1).run(tmp_path, CONFIGS[name], files, num_fewshot=find_task(name).num_fewshot)
    generated: list[Any] = [sample.requests[0].text for sample in theirs.samples]
    num_filters = len(generated) // len(documents)  # lm-eval lists a document once for each of its filters
    assert generated == [text for text in ours for _ in range(num_filters)]


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text(encoding="utf-8")), ids=lambda case: case["task"])
def test_the_golden_file_is_what_lm_eval_asks(case: Any, tmp_path: Path) -> None:
    path = write_table(tmp_path / "data", tables_of(case["task"])[0], [case["document"]])
    request, *repeated = asked(tmp_path, case["config"], {"test": path, "train": path})
    assert all(again == request for again in repeated), "as often as there are samples"
    assert request.prompt == case["prompt"]
    assert list(request.until) == case["until"]
    assert (request.max_tokens or 256) == case["max_tokens"]
