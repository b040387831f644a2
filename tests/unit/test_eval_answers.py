"""Answers read out of text, against lm-eval 0.4.13's results for the same strings."""

import re

import pytest

from rayllm.eval.answers import hendrycks, minerva, numbers
from rayllm.eval.answers.boxed import last_boxed

GOLD = "#### 1,234"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("thus #### 1,234", True, True),
        ("The answer is 1234.", False, True),
        ("It costs $1,234.", False, True),
        ("#### 1,234.\n#### 9", True, False),
        ("The total is 1234 dollars, i.e. 2 per day", False, False),
        ("nothing at all", False, False),
        ("", False, False),
    ],
)
def test_gsm8k(text: str, strict: bool, flexible: bool) -> None:
    assert numbers.same_number(numbers.first_number(text, numbers.HASHES), GOLD) is strict
    assert numbers.same_number(numbers.last_number(text), GOLD) is flexible


def test_what_gsm8k_extracts() -> None:
    assert numbers.first_number("The answer is 1234.", numbers.HASHES) == "[invalid]"
    assert numbers.first_number("The answer is 1234.", numbers.SENTENCE) == "1234"  # the dot goes to the pattern's end
    assert numbers.last_number("The total is 1234 dollars, i.e. 2 per day") == "2"
    assert numbers.last_number("#### 1,234.\n#### 9") == "9"
    assert numbers.last_number("It costs $1,234.") == "$1,234."
    assert numbers.last_number("minus -7") == "-7"
    assert numbers.last_number("no number") == "[invalid]"


@pytest.mark.parametrize("number", ["1,234.", "$5", "x #### 7", "#### 1 #### 2.", "3.\n", "..", "A", "#### ", "####7"])
def test_numbers_are_compared_as_the_reference_patterns_do(number: str) -> None:
    expected = number
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        expected = re.sub(pattern, "", expected)
    assert numbers.same_number(number, expected) is (numbers._unify(expected) == expected.lower())
    assert numbers._unify(number) == expected.lower()


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed 7$.", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed{never closed", None),
        ("nothing", None),
        (r"\boxed{}", ""),
        ("{" * 100_000, None),
        (r"\boxed" + "{" * 100_000, None),
    ],
)
def test_boxed(solution: str, answer: str | None) -> None:
    assert last_boxed(solution) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        (r"\frac12", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("x=5", "5", True),
        ("1/2", r"\frac{1}{2}", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"50\%", "50", True),
        (r"5 \text{ cm}", "5", True),
        (r"90^\circ", "90", True),
        ("(3,4)", "(3, 4)", True),
        ("1,000", "1000", False),
        ("2/4", r"\frac{1}{2}", False),
        ("-.5", "-0.5", False),
        (r"\frac", r"\frac", True),  # the rules fail, the strings are the same
        (r"\frac ", r"\frac", False),
        (r"\tfrac1{72}", r"\frac{1}{72}", True),
        ("5", None, False),
    ],
)
def test_hendrycks_equality(answer: str, gold: str | None, equal: bool) -> None:
    assert hendrycks.is_equiv(answer, gold) is equal


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"The answer is $\frac12$.", True),
        (r" \frac12", True),
        (r"$x$ so $y=\frac12$", False),
        (r"The answer is \boxed{\frac{1}{2}}", False),
        (r"$\boxed{\frac12}$", False),
    ],
)
def test_hendrycks_reads_between_the_outer_dollar_signs(text: str, right: bool) -> None:
    assert hendrycks.is_equiv(hendrycks.extract_answer(text), r"\frac{1}{2}") is right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Final Answer: The final answer is $5$. I hope it is correct.", "5"),
        ("Final Answer: The final answer is $5$.", "[invalidanswer]"),
        ("Final Answer: The final answer is $5$. ", "5"),
        (r"so \boxed{5}", "[invalidanswer]"),
        ("Final Answer: The final answer is\n$5$. I hope it is correct.", "[invalidanswer]"),
    ],
)
def test_minerva_reads_the_sentence_of_its_shots(text: str, answer: str) -> None:
    assert minerva.normalize(minerva.extract_answer(text)) == answer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (r"\left(3,\frac{\pi}{2}\right)", r"\left(3,\frac{\pi}{2}\right)"),
        ("100,000", "100000"),
        ("0,1", "0,1"),
        (r"x = 12 \text{ cm}", "12"),
        (r"\$5.00", "5.00"),
        ("a line", "line"),
        (r"$\frac{\sqrt3}{2}$", r"\frac{\sqrt{3}}{2}"),
        (r"\sqrt[3]8", r"\sqrt[3]{8}"),
        (r"2\pi cm", r"2\pi"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        ("", ""),
    ],
)
def test_minerva_normal_form(answer: str, normal: str) -> None:
    assert minerva.normalize(answer) == normal
