"""Runs a program that a model wrote against a problem's tests, and believes nothing that the program says.

The program runs in a confined process. The tests run in another one, confined too, and call the program's functions
over a socket; only plain values come back. So the program cannot see the tests, end them, or answer for them: it
passes when the tests' own process reaches their end. Neither process outlives its time or can start another.
"""

import contextlib
import dataclasses
import json
import logging
import os
import select
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rayllm.core.errors import ConfigError
from rayllm.eval.sandbox import seccomp
from rayllm.eval.sandbox.jail import Isolation, Limits
from rayllm.eval.sandbox.judge import ENDED
from rayllm.eval.sandbox.launcher import JUDGE, OUT_OF_SPACE, OUT_OF_TIME, PROGRAM

START_LIMIT_S = 60.0
TIMED_OUT = "timed out"
TOO_MUCH_WRITTEN = "wrote more than there is room for"

_log = logging.getLogger(__name__)
_PACKAGE_ROOT = str(Path(__file__).parents[3])
_END_LIMIT_S = 10.0
_LIMITS_MET = {OUT_OF_TIME: TIMED_OUT, OUT_OF_SPACE: TOO_MUCH_WRITTEN}  # by a launcher's exit status


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """`names`: what the tests may use of the program. `setup`: run before the tests, in their process."""

    program: str
    tests: str
    names: frozenset[str]
    setup: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`problem` is a short text; None if all tests passed."""

    problem: str | None

    @property
    def passed(self) -> bool:
        return self.problem is None


class _NotStartedError(Exception):
    """The processes could not be confined; no code was run."""


class Sandbox:
    """May be used from several threads. ConfigError where this machine has no way to confine a process."""

    def __init__(self, *, limits: Limits | None = None, isolation: Isolation | None = None) -> None:
        self._limits = limits or Limits()
        self._environment = {
            "PYTHONPATH": _PACKAGE_ROOT,
            "PYTHONHASHSEED": "0",  # a verdict that can be had again
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.isolation = self._strongest() if isolation is None else isolation

    def run(self, check: Check) -> Verdict:
        """ConfigError if the processes do not start, which says nothing about the program."""
        try:
            return self._run(check, self.isolation)
        except _NotStartedError as error:
            raise ConfigError(f"the sandbox for tested code does not start: {error}") from None

    def _strongest(self) -> Isolation:
        if not seccomp.is_supported():
            raise ConfigError("code of a model is run on Linux only (x86_64, aarch64), where it can be confined")
        probe = Check(
            program="import bisect, json, math, random\ndef add(a, b): return math.floor(a + b)",
            tests="assert add(1, 2) == 3",
            names=frozenset({"add"}),
        )
        reasons: list[str] = []
        for isolation in Isolation:
            try:
                verdict = self._run(probe, isolation)
            except _NotStartedError as error:
                reasons.append(f"{isolation}: {error}")
                continue
            if not verdict.passed:
                reasons.append(f"{isolation}: {verdict.problem}")
                continue
            if reasons:
                _log.warning(
                    "tested code gets no namespaces here (%s); it is kept from the network, from processes and from "
                    "files by seccomp and Landlock, but can see which files there are",
                    "; ".join(reasons),
                )
            return isolation
        raise ConfigError(f"this machine cannot confine code of a model, so none is run: {'; '.join(reasons)}")

    def _run(self, check: Check, isolation: Isolation) -> Verdict:
        with contextlib.ExitStack() as stack:
            common = {
                "isolation": isolation,
                "limits": dataclasses.asdict(self._limits),
                "readable": _python_directories(),
            }
            tests_end, program_end = socket.socketpair()
            verdicts, verdict = os.pipe()
            stack.callback(os.close, verdicts)
            with tests_end, program_end, os.fdopen(verdict, "wb"):
                keep = [tests_end.fileno(), verdict]
                tests = {"role": JUDGE, "setup": check.setup, "tests": check.tests, "names": sorted(check.names)}
                judge = stack.enter_context(self._launched({**common, **tests}, keep))
                keep = [program_end.fileno()]
                program = {"role": PROGRAM, "source": check.program}
                confined = stack.enter_context(self._launched({**common, **program}, keep))
            lines = _Lines(verdicts)
            try:
                lines.next(START_LIMIT_S)  # the program's process is ready
            except (EOFError, TimeoutError):
                raise _NotStartedError(_reason(confined) or _reason(judge) or "no reason is given") from None
            try:
                problem = lines.next(self._limits.wall_s)
            except TimeoutError:
                return Verdict(problem=TIMED_OUT)
            except EOFError:
                return Verdict(problem=_limit_met(judge) or "the tests did not come to an end")
            if problem == ENDED:
                problem = _limit_met(confined) or ENDED
            return Verdict(problem=None if problem is None else str(problem))

    @contextlib.contextmanager
    def _launched(self, order: dict[str, object], keep: list[int]) -> Iterator[subprocess.Popen[bytes]]:
        """Until the context ends; then the process and the one that it confines are gone."""
        with tempfile.TemporaryDirectory(prefix="rayllm-", ignore_cleanup_errors=True) as directory:
            process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-B", "-m", "rayllm.eval.sandbox.launcher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=self._environment,
                cwd="/",
                pass_fds=keep,
                start_new_session=True,
            )
            with _ended_at_last(process):
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps({**order, "directory": directory, "keep": keep}).encode() + b"\n")
                    process.stdin.flush()
                yield process


@contextlib.contextmanager
def _ended_at_last(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A launcher, and by that the process that it confines."""
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # and with it, by its death signal, the process that it confines
            process.wait()
        process.stderr.close()


class _Lines:
    """JSON, one value a line, from a pipe that only the tests' process writes to."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._data = b""

    def next(self, limit_s: float) -> object:
        """TimeoutError, or EOFError when the writer is gone."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._data:
            readable, _, _ = select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TimeoutError
            piece = os.read(self._pipe, 1 << 16)
            if not piece:
                raise EOFError
            self._data += piece
        line, _, self._data = self._data.partition(b"\n")
        value: object = json.loads(line)
        return value


def _limit_met(launcher: subprocess.Popen[bytes]) -> str | None:
    """Because of which its confined process is no more."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return _LIMITS_MET.get(launcher.wait(_END_LIMIT_S))
    return None


def _reason(process: subprocess.Popen[bytes]) -> str:
    """What a launcher that gave up wrote. Its confined process has no stderr of ours."""
    assert process.stderr is not None
    assert process.stdin is not None
    process.stdin.close()
    text = process.stderr.read().decode(errors="replace").strip()
    return text.splitlines()[-1] if text else ""


@cache
def _python_directories() -> list[str]:
    paths = [sys.prefix, sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64"]
    return [
        *paths,
        *(path for key in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_path(key))),
    ]


@cache
def shared_sandbox() -> Sandbox:
    """One for all tasks: looking for the strongest isolation starts processes."""
    return Sandbox()
