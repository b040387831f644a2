r"""The answer of a MATH solution: what stands in its last \boxed{...}."""

_BOXED_SPACE = r"\boxed "


def last_boxed(text: str) -> str | None:
    r"""What is inside the last \boxed{...} (or \fbox{...}), braces balanced; None where there is none that closes.

    The data has a few `\boxed 5`: what follows the last of them, up to a dollar sign or the end.
    """
    if _BOXED_SPACE in text:
        return text.rpartition(_BOXED_SPACE)[2].partition("$")[0]
    start = text.rfind(r"\boxed")
    if start < 0:
        start = text.rfind(r"\fbox")
    if start < 0:
        return None
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[text.index("{", start) + 1 : position]
    return None
