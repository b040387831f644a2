"""Mathematics compared in processes that may be killed: right answers, and hostile text that must not be waited for."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rayllm.eval.answers import math_check
from rayllm.eval.answers.math_check import MathChecker

CPU_LIMIT_S = 1.0
MEGABYTE = 1 << 20
ANSWER = "Final Answer: The final answer is"


@pytest.fixture(scope="module")
def checker() -> Iterator[MathChecker]:
    checker = MathChecker(cpu_limit_s=CPU_LIMIT_S)
    yield checker
    checker.close()


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("x+1", "1+x", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
        ("(3,4)", "(3,4)", True),
        ("[2,5)", "[2,5)", True),
        ("(3,4)", "(3, 4)", False),
        ("2", "3", False),
        ("", "", False),
        (r"\frac{", "1", False),
    ],
)
def test_equal(checker: MathChecker, answer: str, gold: str, equal: bool) -> None:
    assert checker.equal(answer, gold) is equal


@pytest.mark.parametrize(
    ("solution", "text", "right"),
    [
        (r"so $\boxed{\frac{1}{2}}$", r"I think \boxed{0.5}.", True),
        (r"so $\boxed{\frac{1}{2}}$", "the answer is 1/2", True),
        (r"so $\boxed{\frac{1}{2}}$", "the answer is 2/3", False),
        (r"\boxed{(3,4)}", r"\boxed{(3, 4)}", True),
        (r"\boxed{7}", "", False),
    ],
)
def test_verify(checker: MathChecker, solution: str, text: str, right: bool) -> None:
    assert checker.verify(solution, text) is right


def test_read_answer(checker: MathChecker) -> None:
    assert checker.read_answer(f"{ANSWER} $\\frac12$. I hope it is correct.") == r"\frac{1}{2}"
    assert checker.read_answer("\ud800 nothing") == "[invalidanswer]"


HOSTILE_ANSWERS = {
    "braces": "{" * MEGABYTE,
    "nested fractions": r"\frac{1}{" * 20_000 + "1" + "}" * 20_000,
    "tower of powers": "9^{9^{9^{9^{9}}}}",
    "factorials": "(((9!)!)!)!",
    "nested roots": r"\sqrt{1+" * 3000 + "x" + "}" * 3000,
    "long sum": "+".join(f"x_{{{i}}}^{i}" for i in range(3000)),
}
HOSTILE_TEXTS = {
    "braces": "{" * MEGABYTE,
    "the sentence without its end, again and again": f"{ANSWER} " * (MEGABYTE // 32) + "\n",
    "one long line": f"{ANSWER} {'x' * MEGABYTE}. I hope it is correct.",
    "text in text": ANSWER + r"\text{" * (MEGABYTE // 6) + ". I hope it is correct.",
    "dollars": ANSWER + "$ " * (MEGABYTE // 2) + ". I hope it is correct.",
    "boxes in boxes": r"\boxed{" * (MEGABYTE // 8),
}


def seconds(start: float) -> float:
    return time.monotonic() - start


@pytest.mark.parametrize("answer", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS)
def test_a_hostile_answer_is_wrong_in_time(checker: MathChecker, answer: str) -> None:
    start = time.monotonic()
    assert checker.equal(answer, "1") is False
    assert seconds(start) < math_check.WALL_FACTOR * CPU_LIMIT_S + 5
    assert checker.equal("1", "1") is True  # the next one is not its victim


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_a_hostile_text_is_wrong_in_time(checker: MathChecker, text: str) -> None:
    start = time.monotonic()
    answer = checker.read_answer(text)
    assert answer is None or not checker.equal(answer, "1")
    assert checker.verify(r"\boxed{1}", text) is False
    assert seconds(start) < 2 * (math_check.WALL_FACTOR * CPU_LIMIT_S + 5)
    assert checker.equal("1", "1") is True


def test_threads_have_processes_of_their_own() -> None:
    checker = MathChecker(cpu_limit_s=CPU_LIMIT_S)
    pairs = [(f"{i}+x", f"x+{i if i % 3 else i + 1}") for i in range(24)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda pair: checker.equal(*pair), pairs)) == [i % 3 != 0 for i in range(24)]
    pids = [worker._process.pid for worker in checker._idle]
    assert 1 <= len(pids) <= 2
    checker.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
