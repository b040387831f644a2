"""The generation tasks: lm-eval's prompts for documents of our own, and what answers to them are worth."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rayllm.core.errors import ConfigError
from rayllm.eval.data import Data
from rayllm.eval.registry import find_task
from rayllm.eval.sandbox.check import Check, shared_sandbox
from rayllm.eval.task import Document, Generate, Generated, Score, choose_shots

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "generation.json").read_text(encoding="utf-8"))
DOCUMENTS: Mapping[str, Mapping[str, Any]] = {case["task"]: case["document"] for case in GOLDEN}


def document(task: str) -> Document:
    return Document(index=0, fields=DOCUMENTS[task], subject="algebra" if "math" in task else "")


def score(name: str, *texts: str, like: str = "") -> Score:
    return find_task(name).score(document(like or name), [Generated(texts=texts)])


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["task"])
def test_requests_are_those_of_lm_eval(case: Mapping[str, Any], tmp_path: Path) -> None:
    task, one = find_task(case["task"]), document(case["task"])
    pool = task.shots(Data(tmp_path)) if task.num_fewshot else {}  # the shots are fixed: no data is read
    (shots,) = choose_shots([one], pool, task.num_fewshot, task.shot_order)
    (request,) = task.requests(one, task.prompt(one, shots))
    assert isinstance(request, Generate)
    assert isinstance(request.prompt, str)
    assert request.prompt + request.prefix == case["prompt"]
    assert list(request.until) == case["until"]
    assert request.max_tokens == case["max_tokens"]
    many = case["task"].startswith("humaneval_64")
    assert (request.n, request.temperature, request.top_p) == ((64, 0.2, 0.95) if many else (1, 0.0, 1.0))


def test_chat_variants_ask_a_user_message() -> None:
    for name, like in (("gsm8k_cot_chat", "gsm8k_cot"), ("humaneval_instruct_chat", "humaneval_instruct")):
        plain, chat = find_task(like), find_task(name)
        one = document(like)
        (expected,) = plain.requests(one, plain.question(one))
        (request,) = chat.requests(one, chat.question(one))
        assert isinstance(request, Generate)
        assert isinstance(expected, Generate)
        assert request.prompt == (("user", expected.prompt),)
        assert (request.prefix, request.until) == (expected.prefix, expected.until)


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "extracted"),
    [
        (" 1,200 / 40 = 30. The answer is 30.", 1.0, 1.0, "30."),
        (" The answer is $30", 0.0, 1.0, "$30"),
        (" The answer is 40.", 0.0, 0.0, "40."),
        ("", 0.0, 0.0, "[invalid]"),
    ],
)
def test_gsm8k_cot(text: str, strict: float, flexible: float, extracted: str) -> None:
    found = score("gsm8k_cot", text)
    assert found.values == {"strict-match": strict, "flexible-extract": flexible}
    assert found.extracted == extracted


def test_gsm8k_compares_with_the_solutions_end() -> None:
    found = score("gsm8k", "30 of them\n#### 30.", like="gsm8k_cot")
    assert found.values == {"strict-match": 1.0, "flexible-extract": 1.0}


def test_hendrycks_math() -> None:
    assert score("hendrycks_math_algebra", r" It is $\frac13$.").values == {"exact_match": 1.0}
    assert score("hendrycks_math_algebra", r" It is \boxed{\frac13}.").values == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("text", "equal", "verified"),
    [
        (r" Final Answer: The final answer is $\frac{2}{6}$. I hope it is correct.", 1.0, 1.0),
        (r" so $\boxed{\frac13}$", 0.0, 1.0),
        (r" Final Answer: The final answer is $3$. I hope it is correct.", 0.0, 0.0),
    ],
)
def test_minerva_math(text: str, equal: float, verified: float) -> None:
    assert score("minerva_math_algebra", text).values == {"exact_match": equal, "math_verify": verified}


@pytest.mark.parametrize(
    ("text", "verified", "equal", "extracted"),
    [
        (r"First \boxed{2}, then \boxed{\frac{1}{3}}.", 1.0, 1.0, r"\frac{1}{3}"),
        (r"\boxed{3}", 0.0, 0.0, "3"),
        (r"It is $\frac{1}{3}$.", 0.0, 0.0, None),
        ("{" * (1 << 20), 0.0, 0.0, None),
    ],
)
def test_math_boxed(text: str, verified: float, equal: float, extracted: str | None) -> None:
    found = score("math_boxed_algebra", text, like="minerva_math_algebra")
    assert found.values == {"math_verify": verified, "exact_match": equal}
    assert found.extracted == extracted


RIGHT = "    return max(numbers)\n"


@pytest.mark.parametrize(
    ("name", "text", "passes"),
    [
        ("humaneval", RIGHT, 1.0),
        ("humaneval", "    return numbers[0]\n", 0.0),
        ("humaneval", "    import os; os._exit(0)\n", 0.0),
        ("humaneval", "", 0.0),
        ("humaneval_instruct", f"{RIGHT}```\nThat is all.", 1.0),
        ("humaneval_instruct", f"{RIGHT}That is all.", 0.0),
        ("mbpp", "def add(a, b):\n    return a + b\n", 1.0),
        ("mbpp", "def add(a, b):\n    return 3\n", 0.0),
    ],
)
def test_programs(name: str, text: str, passes: float) -> None:
    assert score(name, text).values == {"pass@1": passes}
    assert find_task(name).environment().keys() == {"sandbox"}
    assert find_task(name).runs_code


ENCODED = {
    "prompt": """import math

class Key:
    def __init__(self, shift):
        self.shift = shift

def encode(s, key):
    return "".join(chr(math.floor(ord(each) + key.shift)) for each in s)


def decode(s, key):
    \"\"\"Takes what `encode` has made and gives the text.\"\"\"
""",
    "test": """def check(candidate):
    for text in ("abc", "xy"):
        key = Key(2)
        assert candidate(encode(text, key), key) == text
""",
    "entry_point": "decode",
}
DECODED = '    return "".join(chr(ord(each) - key.shift) for each in s)\n'


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (DECODED, 1.0),
        (DECODED + "encode = None\n", 1.0),
        ("    return s\nencode = lambda s, key: s\n", 0.0),
        ("    return s\nmath.floor = lambda x: 0\n", 0.0),
        ("    global encode\n    encode = lambda s, key: s\n    return s\n", 0.0),
    ],
)
def test_the_prompts_helpers_are_not_the_programs(text: str, passes: float) -> None:
    """HumanEval's decode_cyclic is tested with the prompt's encode_cyclic."""
    one = Document(index=0, fields=ENCODED)
    assert find_task("humaneval").score(one, [Generated(texts=(text,))]).values == {"pass@1": passes}


def test_many_samples_give_pass_at_k() -> None:
    texts = [RIGHT] * 3 + ["    return 0\n"] * 61
    values = score("humaneval_64", *texts).values
    assert values.keys() == {f"pass@{k}" for k in (2, 8, 16, 32, 64)}
    assert values["pass@2"] == pytest.approx(1 - (61 * 60) / (64 * 63))
    assert values["pass@64"] == 1.0


def test_rewards_end_where_the_answer_does() -> None:
    cot = find_task("gsm8k_cot")
    assert cot.reward(document("gsm8k_cot"), " The answer is 30.\n\nQ: And now? The answer is 7.") == 1.0
    humaneval = find_task("humaneval_64")
    one = document("humaneval")
    assert humaneval.reward(one, RIGHT + "\nprint(1 / 0)", allow_code_execution=True) == 1.0
    assert humaneval.reward(one, "    return 0\n", allow_code_execution=True) == 0.0


def refuse_to_run(check: Check) -> NoReturn:
    raise AssertionError("the program was run")


@pytest.mark.parametrize("name", ["humaneval", "humaneval_instruct", "humaneval_64", "mbpp"])
def test_rewards_run_programs_only_where_that_is_allowed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, one = find_task(name), document(name)
    monkeypatch.setattr(shared_sandbox(), "run", refuse_to_run)
    with pytest.raises(ConfigError, match=f"{name} runs programs .* allow it with --allow-code-execution"):
        task.reward(one, RIGHT)
    with pytest.raises(AssertionError, match="the program was run"):
        task.reward(one, RIGHT, allow_code_execution=True)
