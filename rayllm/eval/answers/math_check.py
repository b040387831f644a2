"""Mathematics of a model read and compared, in processes that are killed when it takes too long.

A model may write a megabyte of braces, nest without end, or ask for a power with more digits than atoms: regular
expressions, parsers and sympy do not come back from that, and no signal handler in the same process interrupts them.
"""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

from rayllm.core.errors import ConfigError

CPU_LIMIT_S = 5.0  # lm-eval gives each step as long, by the clock
WALL_FACTOR = 6  # how much longer the clock may run, for a machine that is busy with other things
START_LIMIT_S = 120.0


class MathChecker:
    """May be used from several threads; each has a process of its own while it waits.

    What cannot be done within the limit counts as not found, not equal, not verified.
    """

    def __init__(self, *, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._idle: list[_Worker] = []
        self._lock = Lock()

    def read_answer(self, text: str) -> str | None:
        """`rayllm.eval.answers.minerva`'s answer in a model's text, normalized."""
        answer = self._call("read_answer", text)
        return None if answer is None else str(answer)

    def normalize(self, answer: str) -> str | None:
        """`rayllm.eval.answers.minerva`'s normal form of an answer out of a model's text."""
        normal = self._call("normalize", answer)
        return None if normal is None else str(normal)

    def equal(self, answer: str, gold: str) -> bool:
        """Of two normalized LaTeX strings: the same, or equal to sympy."""
        return self._call("equal", answer, gold) is True

    def verify(self, solution: str, text: str) -> bool:
        """math-verify's opinion: does `text` come to the answer of `solution`?"""
        return self._call("verify", solution, text) is True

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def _call(self, operation: str, *arguments: str) -> Any:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker(self._cpu_limit_s)
        try:
            result = worker.ask(operation, *arguments)
        except (EOFError, OSError, TimeoutError):  # the limits killed it, or its own stack did
            worker.kill()
            return None
        except BaseException:
            worker.kill()
            raise
        with self._lock:
            self._idle.append(worker)
        return result


@cache
def shared_checker() -> MathChecker:
    """One for all tasks: a process takes seconds to start."""
    checker = MathChecker()
    atexit.register(checker.close)
    return checker


class _Worker:
    """ConfigError where the libraries are not installed."""

    def __init__(self, cpu_limit_s: float) -> None:
        self._wall_limit_s = WALL_FACTOR * cpu_limit_s
        command = [sys.executable, "-m", "rayllm.eval.answers.math_worker", str(cpu_limit_s)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._replies = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        problem = self._first_reply()
        if problem is not None:
            self.kill()
            raise ConfigError(
                f"comparing mathematics needs sympy, math-verify and antlr4: {problem}; install rayllm[eval]"
            )

    def ask(self, operation: str, *arguments: str) -> Any:
        """TimeoutError, EOFError or OSError where no answer comes; the worker is of no use then."""
        self._requests.send_bytes(json.dumps([operation, *arguments]).encode())
        return self._reply(self._wall_limit_s)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._replies.close()

    def _first_reply(self) -> str | None:
        try:
            problem = self._reply(START_LIMIT_S)
        except TimeoutError:
            return f"their process did not start within {START_LIMIT_S:.0f} s"
        except (EOFError, OSError):
            return "their process ended as it started"
        return None if problem is None else str(problem)

    def _reply(self, limit_s: float) -> Any:
        if not self._replies.poll(limit_s):
            raise TimeoutError
        return json.loads(self._replies.recv_bytes())
