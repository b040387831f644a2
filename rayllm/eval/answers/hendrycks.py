r"""Equality of answers as `hendrycks_math` has it: of strings, after unifying how LaTeX may write the same thing.

No arithmetic and no algebra, and a \boxed{...} in the model's text is not looked for: instruction models score about
0 here. The rules are those of Hendrycks et al. 2021 (MATH), as lm-eval applies them, with their oddities; only strings
that they unify count as equal.
"""


def extract_answer(text: str) -> str:
    """What is between the first and the last dollar sign of the model's text; all of it where there are not two."""
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1 : last] if first != last else text


def is_equiv(answer: str, gold: str | None) -> bool:
    """Where the rules fail on either, as they do on a half-written fraction, the strings themselves are compared."""
    if gold is None:
        return False
    try:
        return unify(answer) == unify(gold)
    except ValueError:
        return answer == gold


def unify(text: str) -> str:
    """ValueError where the rules do not apply."""
    for written, unified in (
        ("\n", ""),
        (r"\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
        (r"\$", ""),
    ):
        text = text.replace(written, unified)
    text = _without_unit(text)
    for written, unified in ((r"\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(written, unified)
    if text.startswith("."):
        text = "0" + text
    if text.count("=") == 1:
        name, _, value = text.partition("=")
        text = value if len(name) <= 2 else text
    text = _with_braced_roots(text).replace(" ", "")
    text = _with_braced_fractions(text)
    if text == "0.5":
        return r"\frac{1}{2}"
    return _slash_as_fraction(text)


def _without_unit(text: str) -> str:
    value, *units = text.split(r"\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    return value


def _with_braced_roots(text: str) -> str:
    r"""\sqrt3 as \sqrt{3}."""
    head, *roots = text.split(r"\sqrt")
    if not all(roots):
        raise ValueError("a root of nothing")
    return head + "".join(
        r"\sqrt" + root if root.startswith("{") else rf"\sqrt{{{root[0]}}}{root[1:]}" for root in roots
    )


def _with_braced_fractions(text: str) -> str:
    r"""\frac12 and \frac1{72} with both parts in braces, but not \frac{72}1. One digit alone leaves all as it was."""
    head, *fractions = text.split(r"\frac")
    parts = [head]
    for fraction in fractions:
        if not fraction:
            raise ValueError("a fraction of nothing")
        if fraction.startswith("{"):
            parts.append(fraction)
        elif len(fraction) < 2:
            return text
        elif fraction[1] == "{":
            parts.append(f"{{{fraction[0]}}}{fraction[1:]}")
        else:
            parts.append(f"{{{fraction[0]}}}{{{fraction[1]}}}{fraction[2:]}")
    return r"\frac".join(parts)


def _slash_as_fraction(text: str) -> str:
    r"""3/4 as \frac{3}{4}, for whole numbers alone; ValueError for anything else over anything else."""
    if text.count("/") != 1:
        return text
    above, below = map(int, text.split("/"))
    return rf"\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
