"""Numbers in a model's text, as GSM8K's tasks in lm-eval read and compare them.

Every function takes linear time: text of a model may be hostile.
"""

import re
from re import Pattern

INVALID = "[invalid]"
HASHES = re.compile(r"#### (\-?[0-9\.\,]+)")  # as the data's own answers end
SENTENCE = re.compile(r"The answer is (\-?[0-9\.\,]+).")  # as the chain-of-thought shots end
_ANY = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def first_number(text: str, pattern: Pattern[str]) -> str:
    """Strict: the first number where `pattern` wants it."""
    found = pattern.search(text)
    return found[1].strip() if found else INVALID


def last_number(text: str) -> str:
    """Flexible: the last number anywhere. It may keep the dot that ends a sentence, or be a run of dots alone."""
    last = INVALID
    for found in _ANY.finditer(text):
        last = found[0].strip()
    return last


def same_number(answer: str, gold: str) -> bool:
    """As strings, without commas, dollar signs, all up to the last "#### ", and one final dot."""
    return _unify(answer) == _unify(gold)


def _unify(number: str) -> str:
    # The last dot goes even before a final line break: that is what `$` means to a regular expression.
    number = number.replace(",", "").replace("$", "").rpartition("#### ")[2]
    number = re.sub(r"\.$", "", number)
    return number.lower()
