"""The process that reads and compares mathematics: `python -m rayllm.eval.answers.math_worker CPU_LIMIT_S`.

Answers requests (JSON arrays: operation, arguments) on stdin with JSON on a copy of stdout, one at a time, until stdin
ends. Each has a limit in seconds of this process's time; then the kernel kills it, in the middle of whatever regular
expression or big-integer power it is in. So nothing here needs a limit of its own.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rayllm.eval.answers import minerva

MAX_MEMORY_BYTES = 4 << 30  # of address space: 9^{9^{9^9}} asks for more


def equal(answer: str, gold: str) -> bool:
    """The same string, or expressions whose difference sympy simplifies to 0."""
    import sympy
    from sympy.parsing.latex import parse_latex
    from sympy.parsing.latex.errors import LaTeXParsingError

    if answer and answer == gold:  # sympy does not parse tuples, intervals and matrices
        return True
    try:
        return bool(sympy.simplify(parse_latex(answer) - parse_latex(gold)) == 0)
    except (
        LaTeXParsingError,
        sympy.SympifyError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ):
        return False


def verify(solution: str, text: str) -> bool:
    """Whether math-verify finds the same answer in both."""
    import math_verify

    return bool(math_verify.verify(gold=math_verify.parse(solution), target=math_verify.parse(text)))


def read_answer(text: str) -> str:
    return minerva.normalize(minerva.extract_answer(text))


# With how many limits each has: math-verify gives each parse and the comparison 5 s of their own.
OPERATIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "equal": (equal, 1),
    "verify": (verify, 3),
    "read_answer": (read_answer, 1),
    "normalize": (minerva.normalize, 1),
}


def warm_up() -> None:
    """Imports and builds what the first request would otherwise pay for. ImportError says what is missing."""
    assert equal("x + 1", "1 + x")
    assert verify("$1$", "$1$")


def main() -> None:
    cpu_limit_s = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests = Connection(os.dup(0), writable=False)
    replies = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # whatever a library prints is no reply
    try:
        warm_up()
    except ImportError as error:
        replies.send_bytes(json.dumps(str(error)).encode())
        return
    replies.send_bytes(json.dumps(None).encode())
    while True:
        try:
            operation, *arguments = json.loads(requests.recv_bytes())
        except EOFError:
            return
        function, limits = OPERATIONS[operation]
        signal.setitimer(signal.ITIMER_PROF, limits * cpu_limit_s)
        result = function(*arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.send_bytes(json.dumps(result).encode())


if __name__ == "__main__":
    main()
