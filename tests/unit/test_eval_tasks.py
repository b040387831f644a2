"""Tasks without a model: prompts, scores, averages, and which shots are drawn."""

import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from rayllm.core.errors import ConfigError, DataError
from rayllm.eval.data import Data, documents_of
from rayllm.eval.registry import TASK_NAMES, TASKS, find_task
from rayllm.eval.runner import TaskResult
from rayllm.eval.task import Document, Generated, Likelihood, Loglikelihood, Score, ShotOrder, choose_shots, mean_metric
from rayllm.eval.tasks import kmmlu, mmlu
from tests.eval_documents import GOLDEN, LAW, Golden

KOREAN_SHOT = {
    "question": "질문: 하루는 몇 시간인가?",
    **dict(zip("ABCD", ("12", "24", "36", "48"), strict=True)),
    "target": "하루는 24시간입니다. 따라서, 정답은 (B) 입니다.",
}


def likely(*logprobs: float) -> list[Likelihood]:
    return [Likelihood(logprob=logprob, num_tokens=1, is_greedy=False) for logprob in logprobs]


def document(case: Golden) -> Document:
    rows = next(iter(case.splits.values()))
    subject = {"mmlu_anatomy": "anatomy", "kmmlu_law": "Law"}.get(case.task, "")
    return documents_of(rows, subject)[0]


def test_an_empty_choice_is_scored_as_lm_eval_does():
    """It divides by the lengths with numpy: minus infinity, but for a likelihood of exactly 1."""
    document = Document(index=0, fields={"goal": "", "sol1": "", "sol2": "soup", "label": 1})
    logprobs = [-3.0, -40.0]
    with np.errstate(divide="ignore"):
        best = int(np.argmax(np.array(logprobs) / np.array([0.0, 4.0])))
    responses = [Likelihood(logprob=logprob, num_tokens=1, is_greedy=False) for logprob in logprobs]
    assert find_task("piqa").score(document, responses).values == {"acc": 0.0, "acc_norm": float(best == 1)}


class TestRegistry:
    def test_every_name_makes_a_task_of_that_name(self):
        for name in TASKS:
            task = find_task(name)
            assert task.name == name
            assert task.metrics
            assert task.version

    def test_families_have_their_groups_and_subjects(self):
        assert len(mmlu.GROUP_OF) == 57
        assert len(kmmlu.GROUP_OF) == 45
        assert {"mmlu_stem", "mmlu_us_foreign_policy", "kmmlu_humss", "kmmlu_korean_history"} <= TASKS.keys()
        assert "mmlu_stem" not in TASK_NAMES

    @pytest.mark.parametrize(
        ("name", "meant"),
        [("hellaswagg", "did you mean hellaswag"), ("mmlu_anatomi", "did you mean mmlu_anatomy"), ("zzz", "there are")],
    )
    def test_an_unknown_name(self, name, meant):
        with pytest.raises(ConfigError, match=f"no task is called '{name}'; {meant}"):
            find_task(name)


class TestPrompts:
    def test_mmlu(self):
        case = GOLDEN[0]
        task = find_task("mmlu_anatomy")
        shots = documents_of(case.splits["dev"][:1], "anatomy")
        assert task.prompt(document(case), shots) == (
            "The following are multiple choice questions (with answers) about anatomy.\n\n"
            "Which bone lies in the upper arm?\nA. The femur\nB. The tibia\nC. The humerus\nD. The ulna\nAnswer: C\n\n"
            "Which organ pumps the blood?\nA. The liver\nB. The heart\nC. The skin\nD. The spleen\nAnswer:"
        )

    def test_the_subject_is_written_with_spaces(self):
        task = find_task("mmlu_us_foreign_policy")
        described = task.description(Document(index=0, fields={}, subject="us_foreign_policy"))
        assert described.endswith("about us foreign policy.\n\n")

    def test_kmmlu_answers_count_from_one(self):
        case = GOLDEN[1]
        task = find_task("kmmlu_law")
        lines = ["다음 중 대한민국의 수도는?", "A. 부산", "B. 대구", "C. 서울", "D. 광주", "정답\uff1a"]
        assert task.prompt(document(case), []) == "\n".join(lines)
        assert task.target(document(case)) == "C"
        assert task.score(document(case), likely(-3, -2, -1, -4)).values == {"acc": 1.0}

    def test_hellaswag_loses_its_brackets(self):
        task = find_task("hellaswag")
        assert task.question(document(GOLDEN[2])) == "Baking bread: A woman puts dough into a tin. She"
        assert task.target(document(GOLDEN[2])) == "puts the tin into the oven."

    def test_winogrande_scores_one_end_after_two_beginnings(self):
        task = find_task("winogrande")
        case = next(case for case in GOLDEN if case.task == "winogrande")
        assert list(task.requests(document(case), "shots\n\n")) == [
            Loglikelihood(
                context=f"shots\n\nNora lent Ida her umbrella because {name}", continuation=" had forgotten hers."
            )
            for name in ("Nora", "Ida")
        ]


class TestScores:
    def test_the_first_of_equals_is_taken(self):
        task = find_task("piqa")
        case = next(case for case in GOLDEN if case.task == "piqa")
        first, second = documents_of(case.splits["validation"])
        assert task.score(first, likely(-1.0, -1.0)).values["acc"] == 1.0
        assert task.score(second, likely(-1.0, -1.0)).values["acc"] == 0.0

    def test_by_length(self):
        """-12 over 28 characters is better than -6 over 12."""
        task = find_task("piqa")
        case = next(case for case in GOLDEN if case.task == "piqa")
        second = documents_of(case.splits["validation"])[1]
        assert task.score(second, likely(-12.0, -6.0)).values == {"acc": 1.0, "acc_norm": 0.0}

    def test_a_reward_for_a_written_answer(self):
        task = find_task("mmlu_anatomy")
        one = document(GOLDEN[0])
        texts = [" B", "B. The heart", "B) ", "B\nQ:", "A", "", "Bones", "B is wrong", "BA", "B's"]
        assert [task.reward(one, text) for text in texts] == [1.0] * 4 + [0.0] * 6

    def test_a_reward_for_a_choice_in_words(self):
        piqa = find_task("piqa")
        (one,) = documents_of([{"goal": "To dry", "sol1": "use paper", "sol2": "use paper towels", "label": 0}])
        texts = ["use paper", " use paper.", "use paper, then", "use papers", "use paper towels", "use", ""]
        assert [piqa.reward(one, text) for text in texts] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        winogrande = find_task("winogrande")
        row = {"sentence": "Ann met Eve as _ was home.", "option1": "Ann", "option2": "Eve", "answer": "1"}
        (one,) = documents_of([row])
        assert [winogrande.reward(one, text) for text in (" was home.", "was out.")] == [1.0, 0.0]

    def test_rewards_end_where_the_answer_does(self):
        direct, cot = find_task("kmmlu_direct_law"), find_task("kmmlu_cot_hard_law")
        one = document(GOLDEN[1])
        assert [direct.reward(one, text) for text in ("C", "C.Q: and?", "C\n\nnext", "C D")] == [1.0, 1.0, 1.0, 0.0]
        assert cot.reward(one, "정답은 (C) 입니다.\n\n질문: 정답은 (A) 입니다.") == 1.0
        assert cot.reward(one, "질문: 정답은 (C) 입니다.") == 0.0

    def test_a_text_has_no_reward(self):
        with pytest.raises(ConfigError, match="no reward"):
            find_task("perplexity").reward(Document(index=0, fields={"text": "a"}), "a")

    @pytest.mark.parametrize(
        ("text", "correct"),
        [(" C", 1.0), ("c", 1.0), (" C ) ", 1.0), ("(C)", 1.0), ("C 서울", 0.0), ("", 0.0), ("A", 0.0)],
    )
    def test_kmmlu_direct(self, text, correct):
        task = find_task("kmmlu_direct_law")
        score = task.score(document(GOLDEN[1]), [Generated(texts=(text,))])
        assert score.values["exact_match"] == correct

    @pytest.mark.parametrize(
        ("text", "extracted"),
        [
            ("따라서, 정답은 (C) 입니다.", "C"),
            ("정답은 C입니다. 정답은 (A) 입니다.", "C"),
            ("정답은  C) 서울 입니다!", "C"),
            ("정답은 (C)", "[invalid]"),
            ("The answer is C.", "[invalid]"),
        ],
    )
    def test_kmmlu_cot_hard(self, text, extracted):
        task = find_task("kmmlu_cot_hard_law")
        score = task.score(document(GOLDEN[1]), [Generated(texts=(text,))])
        assert score.extracted == extracted
        assert score.values["exact_match"] == float(extracted == "C")

    def test_written_answers_are_those_of_lm_evals_pattern(self):
        pattern = re.compile(r"(?<=정답은)\s*[(]?(A|B|C|D)[)]?.*(?=입니다.)")
        generator, found = random.Random(0), 0
        pieces = ["정답은", "정답은", "입니다", "입니다", ".", " ", "\n", "\r", "(", ")", "A", "B", "D", "답은", "x"]
        for _ in range(100_000):
            text = "".join(generator.choices(pieces, k=generator.randrange(16)))
            expected = pattern.findall(text)
            assert kmmlu.written_answers(text) == expected, text
            found += bool(expected)
        assert found > 5000

    @pytest.mark.parametrize(
        "piece", ["정답은A", "정답은 ", "정답은", "정답은A입니다", "정답은A입니다.\n", " ", "입니다."]
    )
    @pytest.mark.parametrize("start", ["", "정답은"])
    def test_hostile_answers_are_read_in_time(self, start, piece):
        task = find_task("kmmlu_cot_hard_law")
        started = time.perf_counter()
        task.score(document(GOLDEN[1]), [Generated(texts=(start + piece * ((1 << 20) // len(piece)),))])
        assert time.perf_counter() - started < 5

    def test_perplexity_is_a_ratio_of_sums(self):
        task = find_task("perplexity")
        one, two = documents_of([{"text": "a b c"}, {"text": "한 글\n"}])
        scored = [
            (each, task.score(each, [Likelihood(logprob=logprob, num_tokens=4, is_greedy=False)]))
            for each, logprob in ((one, -6.0), (two, -2.0))
        ]
        by_word, by_byte, bits = task.aggregate(scored)
        assert by_word.value == pytest.approx(math.exp(8 / 6))  # "한 글\n" splits into three, the last one empty
        assert by_byte.value == pytest.approx(math.exp(8 / (5 + 8)))
        assert bits.value == pytest.approx(8 / 13 / math.log(2))

    @pytest.mark.parametrize("name", ["perplexity", "perplexity_strided"])
    def test_a_perplexity_beyond_floats_is_infinite(self, name):
        """A text without spaces is one word."""
        task = find_task(name)
        (one,) = documents_of([{"text": "가" * 300}])
        scored = [(one, task.score(one, [Likelihood(logprob=-900.0, num_tokens=1, is_greedy=False)]))]
        metric = task.aggregate(scored)[0]
        assert metric.value == math.inf
        result = TaskResult(
            task=name, version="", num_fewshot=0, num_documents=1, num_resumed=0, metrics=task.aggregate(scored)
        )
        written = json.loads(json.dumps(result.as_json(), allow_nan=False))["metrics"]
        assert written[metric.name] == {"value": None, "stderr": None, "note": "inf: no finite number"}
        if name == "perplexity":
            assert written["byte_perplexity"]["value"] == pytest.approx(math.e)


class TestAverages:
    def test_micro_over_documents_and_by_group(self):
        task = find_task("mmlu")
        subjects = ["anatomy"] * 3 + ["virology"]
        scored = [
            (Document(index=i, fields={}, subject=subject), Score(values={"acc": float(i % 2)}))
            for i, subject in enumerate(subjects)
        ]
        metrics = {metric.group: metric for metric in task.aggregate(scored)}
        assert metrics[""].value == 0.5
        assert metrics["anatomy"].value == metrics["stem"].value == pytest.approx(1 / 3)
        assert metrics["virology"].value == metrics["other"].value == 1.0
        assert metrics["stem"].num_documents == 3

    def test_kmmlu_macro_over_subjects(self):
        scored = [
            (Document(index=i, fields={}, subject=subject), Score(values={"acc": value}))
            for subject, values in {"Law": (1.0, 0.0, 0.0, 0.0), "Math": (1.0, 1.0)}.items()
            for i, value in enumerate(values)
        ]
        metrics = {(metric.name, metric.group): metric for metric in find_task("kmmlu").aggregate(scored)}
        assert metrics["acc", ""].value == 0.5
        assert metrics["acc_macro", ""].value == pytest.approx((0.25 + 1.0) / 2)
        assert metrics["acc_macro", ""].stderr == pytest.approx(0.25 / 2)

    def test_the_standard_error_is_of_the_mean(self):
        metric = mean_metric("acc", [1.0, 0.0, 0.0, 1.0])
        assert metric.stderr == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))
        assert mean_metric("acc", [1.0]).stderr is None


POOL = {"": documents_of([{"n": n} for n in range(30)])}
DOCUMENTS = documents_of([{"n": n} for n in range(10, 14)])


class TestShots:
    def test_first(self):
        for shots in choose_shots(DOCUMENTS, POOL, 3, ShotOrder.FIRST):
            assert [shot.index for shot in shots] == [0, 1, 2]

    def test_random_is_one_generator_through_the_documents(self):
        generator = random.Random(1234)
        expected = [generator.sample(range(30), 4) for _ in DOCUMENTS]
        got = choose_shots(DOCUMENTS, POOL, 4, ShotOrder.RANDOM)
        assert [[shot.index for shot in shots] for shots in got] == expected

    def test_a_document_is_not_its_own_shot(self):
        for shots, one in zip(choose_shots(DOCUMENTS, POOL, 29, ShotOrder.RANDOM_OTHERS), DOCUMENTS, strict=True):
            assert len(shots) == 29
            assert one.fields not in [shot.fields for shot in shots]
        doubled = {"": [*POOL[""], *POOL[""]]}
        for shots, one in zip(choose_shots(DOCUMENTS, doubled, 58, ShotOrder.RANDOM_OTHERS), DOCUMENTS, strict=True):
            assert len(shots) == 58
            assert one.fields not in [shot.fields for shot in shots]

    def test_none(self):
        assert choose_shots(DOCUMENTS, {}, 0, ShotOrder.RANDOM) == [()] * 4


class TestKmmluFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        import yaml

        config = {
            "doc_to_text": "{{question}}\nA.{{A}}\nB.{{B}}\nC.{{C}}\nD.{{D}}\n정답: 생각해봅시다.",
            "fewshot_config": {"samples": [KOREAN_SHOT] * 5},
        }
        path = tmp_path / "lm_eval/tasks/kmmlu/cot_hard/kmmlu_cot_hard_law.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(config, allow_unicode=True))
        rows = tmp_path / "KMMLU-HARD/law/test.jsonl"
        rows.parent.mkdir(parents=True)
        rows.write_text("".join(json.dumps(row) + "\n" for row in LAW["test"]))
        return tmp_path

    def test_the_worked_solutions_as_questions(self, folder):
        documents = find_task("kmmlu_dev_law").documents(Data(folder))
        assert len(documents) == 5
        assert documents[0].fields == {
            "question": "하루는 몇 시간인가?",
            "answer": 2,
            "A": "12",
            "B": "24",
            "C": "36",
            "D": "48",
        }

    def test_cot_hard_takes_its_wording_from_the_files(self, folder):
        task = find_task("kmmlu_cot_hard_law")
        (one, *_) = task.documents(Data(folder))
        shots = task.shots(Data(folder))["Law"][:1]
        assert task.prompt(one, shots) == (
            "질문: 하루는 몇 시간인가?\nA.12\nB.24\nC.36\nD.48\n정답: 생각해봅시다. "
            "하루는 24시간입니다. 따라서, 정답은 (B) 입니다.\n\n"
            "다음 중 대한민국의 수도는? \nA.부산\nB.대구\nC.서울\nD.광주\n정답: 생각해봅시다."
        )
        (request,) = task.requests(one, "prompt")
        assert (request.until, request.max_tokens) == (("질문:",), 2048)
        assert task.target(one) == "C"

    def test_without_the_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"pip install --no-deps --target DIR lm-eval==0\.4\.13"):
            find_task("kmmlu_dev").documents(Data(tmp_path))
