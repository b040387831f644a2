r"""The answer in a model's text, as `minerva_math` reads it (Lewkowycz et al. 2022, appendix D; lm-eval's version 3.1).

Some of these patterns take quadratic time on hostile text, so text of a model is read in a process that can be killed
(`rayllm.eval.answers.math_check`); a data set's own answers may be read anywhere.
"""

import re

INVALID = "[invalidanswer]"

_END = "I hope it is correct."
_FINAL_ANSWER = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")

_SUBSTITUTIONS = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
# In the paper's order: what one removes may leave what a later one finds.
_REMOVED = (
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "ft",
    "hours",
    "km",
    "units",
    r"\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
    r"\text{s}",
    r"\text{.}",
    "\\text{\ns}",
    r"\text{}^2",
    r"\text{}^3",
    "\\text{\n}",
    r"\text{}",
    r"\mathrm{th}",
    r"^\circ",
    r"^{\circ}",
    r"\;",
    r",\!",
    "{,}",
    '"',
    r"\dots",
)
_UNIT_WORDS = [re.compile(rf"(?<!\\)\b{word}\b") for word in _REMOVED if word.isalpha()]
_COMMAND = re.compile(r"(\\[a-zA-Z]+)")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # what the answer is wrapped in: mathematics, text, a box
        (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
        (r"(\\text\{)(.*?)(\})", r"\2"),
        (r"(\\textbf\{)(.*?)(\})", r"\2"),
        (r"(\\overline\{)(.*?)(\})", r"\2"),
        (r"(\\boxed\{)(.*)(\})", r"\2"),
        # shorthand: \frac12 as \frac{1}{2}, \sqrt[3]8 as \sqrt[3]{8}, \sqrt2 as \sqrt{2}
        (r"(frac)([^{])(.)", r"frac{\2}{\3}"),
        (r"(sqrt)(\[[^\]]*\])(\w)", r"\1\2{\3}"),
        (r"(sqrt)(?!\[)([^{])", r"sqrt{\2}"),
    )
]
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+")


def extract_answer(text: str) -> str:
    """What follows "Final Answer: The final answer is", on its line, without the character that ends the sentence."""
    found = _FINAL_ANSWER.search(text + _END)
    return found[1].strip() if found else INVALID


def normalize(answer: str) -> str:
    answer = answer.rpartition("=")[2]
    for word in _UNIT_WORDS:  # while there are still spaces to tell words by
        answer = word.sub("", answer)
    for written, unified in _SUBSTITUTIONS:
        answer = answer.replace(written, unified)
    for expression in _REMOVED:
        answer = _outside_commands(answer, expression) if expression.isalpha() else answer.replace(expression, "")
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def _outside_commands(text: str, word: str) -> str:
    r"""`text` without `word`, except inside a LaTeX command: the "ft" of \left stays."""
    if word not in text:
        return text
    pieces = _COMMAND.split(text)
    pieces[::2] = [piece.replace(word, "") for piece in pieces[::2]]
    return "".join(pieces)
