"""Tested code cannot pass what it should fail, outlive its time, or reach anything outside."""

import dataclasses
import logging
import os
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rayllm.core.errors import ConfigError
from rayllm.eval.sandbox import check as sandbox_check
from rayllm.eval.sandbox.check import TIMED_OUT, TOO_MUCH_WRITTEN, Check, Sandbox
from rayllm.eval.sandbox.jail import Isolation, Limits
from rayllm.eval.sandbox.problem import of_prompt, of_solution
from tests.unit.sandboxed_programs import FINE, HOSTILE

LIMITS = Limits(cpu_s=1, wall_s=2.0, memory_bytes=1 << 29)
SECRET = 918273645
TESTS = f"assert add(1, 2) == 3\nassert add({SECRET}, 1) == {SECRET + 1}\nassert add(2, 2) == 4"
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module", params=list(Isolation))
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(limits=LIMITS, isolation=request.param)


def run(sandbox: Sandbox, program: str, tests: str = TESTS, *names: str) -> str | None:
    names = names or ("add",)
    check = Check(program=textwrap.dedent(program), tests=textwrap.dedent(tests), names=frozenset(names))
    return sandbox.run(check).problem


@pytest.mark.parametrize("case", FINE.values(), ids=FINE)
def test_right_programs_pass(sandbox: Sandbox, case: str) -> None:
    program, _, tests = textwrap.dedent(case).partition("---\n")
    assert run(sandbox, program, tests, "f", "Pair") is None


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("def add(a, b): return 3", "a test failed: AssertionError"),
        ("def add(a, b): return None", "a test failed"),
        ("x = 1", "NameError: name 'add' is not defined"),
        ("def add(a, b) return", "SyntaxError"),
        ("def add(a, b): return a + c", "NameError: name 'c' is not defined"),
        ("1 / 0", "the program raised ZeroDivisionError"),
        ("def add(a, b): return add(a, b)", "RecursionError"),
        ("", "NameError"),
        ("\0", "SyntaxError"),
        ("(" * 100_000, ""),
    ],
)
def test_wrong_programs_say_why(sandbox: Sandbox, program: str, problem: str) -> None:
    assert problem in (run(sandbox, program) or "passed")


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sessions of the processes that the sandbox starts."""
    started: list[int] = []
    popen = subprocess.Popen

    def record(*arguments: Any, **keywords: Any) -> Any:
        process = popen(*arguments, **keywords)
        started.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", record)
    return started


def processes_of(sessions: list[int]) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[3]) in sessions:
            found.append(text)
    return found


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs_fail_in_time_and_leave_nothing(sandbox: Sandbox, program: str, sessions: list[int]) -> None:
    start = time.monotonic()
    assert run(sandbox, program) is not None
    assert time.monotonic() - start < LIMITS.wall_s + 3
    assert len(sessions) == 2
    assert processes_of(sessions) == []
    assert run(sandbox, RIGHT) is None  # and the next one is not its victim


def test_what_takes_too_long_is_said_to(sandbox: Sandbox) -> None:
    assert run(sandbox, "while True: pass") == TIMED_OUT
    assert run(sandbox, "import time\ntime.sleep(60)") == TIMED_OUT
    assert run(sandbox, RIGHT, "while True: pass") == TIMED_OUT


@pytest.mark.parametrize(
    "deed",
    [
        "open(path, 'w').write('x')",
        "open(path, 'a').write('x')",
        "os.remove(path)",
        "os.truncate(path, 0)",
        "os.chmod(path, 0)",
        "os.utime(path, (0, 0))",
        "os.rename(path, path + '2')",
        "os.symlink('/', path + '2')",
        "os.link(path, path + '2')",
        "os.mkdir(path + '2')",
    ],
)
def test_nothing_outside_is_written(sandbox: Sandbox, tmp_path: Path, deed: str) -> None:
    file = tmp_path / "precious"
    file.write_text("precious")
    file.chmod(0o666)
    tmp_path.chmod(0o777)
    before = file.stat()
    program = f"import os\npath = {str(file)!r}\ntry:\n    {deed}\nexcept OSError: pass\n" + RIGHT
    assert run(sandbox, program) is None
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "precious"
    assert (file.stat().st_mtime_ns, file.stat().st_mode) == (before.st_mtime_ns, before.st_mode)


def test_own_file_system_holds_nothing_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "private"
    file.write_text("private")
    sandbox = Sandbox(limits=LIMITS, isolation=Isolation.NAMESPACES)
    program = (
        f"import os\ndef f(): return os.path.exists({str(file)!r}), os.path.exists('/etc/passwd'), os.listdir('.')"
    )
    assert run(sandbox, program, "assert f() == (False, False, [])", "f") is None


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_no_file_of_the_users_is_read(sandbox: Sandbox, tmp_path: Path, mode: int) -> None:
    file = tmp_path / "private"
    file.write_text("private")
    file.chmod(mode)
    tmp_path.chmod(0o755)
    program = f"""
        import os
        def refused(deed):
            try:
                deed()
            except OSError:
                return True
        def f():
            files = [{str(file)!r}, "/etc/passwd", "/proc/self/environ", "/proc/1/cmdline"]
            folders = [{str(tmp_path)!r}, "/etc"]
            read = [refused(lambda: open(each)) for each in files]
            return read + [refused(lambda: os.listdir(each)) for each in folders]
        def work():
            open("own", "w").write("x")
            return open("own").read() + str(len(os.urandom(3))) + str(open("/dev/null").read())
    """
    tests = """
        assert work() == "x3"
        assert f() == [True] * 6
    """
    assert run(sandbox, program, tests, "f", "work") is None


def test_no_other_socket_is_reached(sandbox: Sandbox) -> None:
    """A pair of datagram sockets needs no network, and yet sends to whoever listens on this machine, a log say."""
    name = f"\0rayllm-{os.getpid()}"
    program = f"""
        import os, socket
        def sent(kind):
            try:
                one, _ = socket.socketpair(socket.AF_UNIX, kind)
                return one.sendto(b"x", {name!r})
            except OSError:
                return None
        def work():
            one, other = socket.socketpair()
            one.sendall(b"x")
            return other.recv(1)
    """
    tests = """
        for kind in (2, 3):  # SOCK_DGRAM, and SOCK_RAW, which is the same there; with each of their flags
            for flags in (0, 0o4000, 0o2000000, 0o2004000):
                assert sent(kind | flags) is None
        sent(1), sent(5)  # streams and sequenced packets go to their other end, whatever name is given
        assert work() == b"x"
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        listener.setblocking(False)
        assert run(sandbox, program, tests, "sent", "work") is None
        with pytest.raises(BlockingIOError):
            listener.recv(1)


def test_a_full_directory_is_said_to(sandbox: Sandbox) -> None:
    program = HOSTILE["many files"]
    said = {Isolation.LANDLOCK: TOO_MUCH_WRITTEN, Isolation.NAMESPACES: "the program raised OSError: [Errno 28]"}
    assert said[sandbox.isolation] in (run(sandbox, program) or "")


THREADS = """
    import threading, time
    threading.stack_size(32768)
    def started(wanted):
        for n in range(wanted):
            try:
                threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
            except RuntimeError:
                return n
        return wanted
"""


def test_threads_are_limited(sandbox: Sandbox) -> None:
    assert run(sandbox, THREADS, "assert 20 <= started(200) <= 32", "started") is None


def test_a_user_cannot_be_changed(sandbox: Sandbox) -> None:
    program = """
        import os
        def become(call, *users):
            try:
                getattr(os, call)(*users)
            except PermissionError:
                return "refused"
        def user():
            return os.getuid()
    """
    tests = """
        assert user() != 0
        for call, *users in [("setuid", 0), ("setreuid", 0, 0), ("setresuid", 0, 0, 0), ("setresgid", 0, 0, 0)]:
            assert become(call, *users) == "refused"
    """
    assert run(sandbox, program, tests, "become", "user") is None


def test_root_becomes_another_user_under_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all purposes where that user reaches Python, and may write where it works."""
    monkeypatch.setattr(sandbox_check, "_python_directories", lambda: ["/usr"])  # Python may lie where only root reads
    program = """
        import os
        def users():
            return os.getresuid() + os.getresgid()
        def work():
            with open("own", "w") as file:
                file.write("x")
            return os.listdir()
    """
    tests = """
        assert len(set(users())) == 1
        assert users()[0] != 0
        assert work() == ["own"]
    """
    sandbox = Sandbox(limits=LIMITS, isolation=Isolation.LANDLOCK)
    assert run(sandbox, program, tests, "users", "work") is None


def test_threads_that_run_already_do_not_count(tmp_path: Path) -> None:
    """Whoever is not root keeps its user under Landlock, and the kernel counts a user's threads."""
    script = """
        import os, pathlib, threading, time
        from rayllm.eval.sandbox.jail import Isolation, Jail, Limits
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(1899999999, 1899999999, 1899999999)
            os.setresuid(1899999999, 1899999999, 1899999999)
        for _ in range(60):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        Jail(
            isolation=Isolation.LANDLOCK, limits=Limits(), directory="/", readable=(), spare_user=0
        )._limit_threads()
    """
    count = "print(started(200), flush=True)\nimport os\nos._exit(0)"
    source = "\n".join([textwrap.dedent(script), textwrap.dedent(THREADS), count])
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert 20 <= int(result.stdout) <= 32


def test_its_environment_and_privileges(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    program = """
        import ctypes, os
        def names(): return [name for name in os.environ if not name.endswith(("NUM_THREADS", "HASHSEED", "LC_CTYPE"))]
        def capabilities():
            header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capget(header, data) == 0
            return list(data)
    """
    assert (
        run(sandbox, program, "assert names() == []\nassert capabilities() == [0] * 6", "names", "capabilities") is None
    )


def test_tests_see_only_what_the_problem_defines(sandbox: Sandbox) -> None:
    program = "def abs(x): return 0\ndef add(a, b): return 7"
    assert run(sandbox, program, "assert abs(add(1, 2) - 3) < 1e-6") is not None
    assert run(sandbox, program, "assert abs(add(1, 2) - 3) < 1e-6", "abs", "add") is None  # a problem about abs
    assert (
        run(sandbox, RIGHT + "helper = 1", "assert helper == 1")
        == "a test raised NameError: name 'helper' is not defined"
    )


def test_verdicts_do_not_depend_on_their_neighbours(sandbox: Sandbox) -> None:
    programs = [RIGHT if i % 3 else "def add(a, b): return 3" for i in range(12)]
    with ThreadPoolExecutor(4) as threads:
        assert [problem is None for problem in threads.map(lambda p: run(sandbox, p), programs)] == [
            i % 3 != 0 for i in range(12)
        ]


def test_set_order_is_the_same_each_time(sandbox: Sandbox) -> None:
    tests = "assert f() == " + repr(subprocess.run(
        [sys.executable, "-c", "print(''.join({'a', 'b', 'c', 'd', 'e'}))"],
        env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True,
    ).stdout.strip())  # fmt: skip
    assert run(sandbox, "def f(): return ''.join({'a', 'b', 'c', 'd', 'e'})", tests, "f") is None


def test_without_namespaces_it_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = Sandbox._run

    def run_(self: Sandbox, check: Check, isolation: Isolation) -> Any:
        if isolation is Isolation.NAMESPACES:
            raise sandbox_check._NotStartedError("unshare: Operation not permitted")
        return real(self, check, isolation)

    monkeypatch.setattr(Sandbox, "_run", run_)
    with caplog.at_level(logging.WARNING):
        sandbox = Sandbox(limits=LIMITS)
        assert run(sandbox, RIGHT) is None
    assert sandbox.isolation is Isolation.LANDLOCK
    (record,) = caplog.records
    assert "no namespaces here (namespaces: unshare: Operation not permitted)" in record.message


def test_nothing_runs_where_nothing_can_be_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_check.seccomp, "is_supported", lambda: False)
    with pytest.raises(ConfigError, match="Linux only"):
        Sandbox()


def test_a_jail_that_cannot_be_built_runs_nothing(tmp_path: Path) -> None:
    sandbox = Sandbox(limits=dataclasses.replace(LIMITS, open_files=1 << 40), isolation=Isolation.LANDLOCK)
    proof = tmp_path / "ran"
    with pytest.raises(ConfigError, match="does not start"):
        run(sandbox, f"open({str(proof)!r}, 'w')")
    assert not proof.exists()


CODE = "import math\nfrom typing import List as L\nX, (Y, *Z) = 1, (2, 3)\nclass A: b = 1\ndef f(q):\n    r = q\n"


def test_what_a_solution_defines_is_for_the_program() -> None:
    found = of_solution(CODE)
    assert found.names == {"X", "Y", "Z", "A", "f"}
    assert found.setup == "import math\nfrom typing import List as L"
    assert of_solution("def f(:").names == frozenset()


def test_what_a_prompt_gives_is_the_tests_own() -> None:
    found = of_prompt(f'{CODE}def g(q):\n    """What is it?"""\n', "g")
    assert found.names == {"A", "g"}
    assert found.setup == (
        "import math\nfrom typing import List as L\nX, (Y, *Z) = (1, (2, 3))\n\ndef f(q):\n    r = q"
    )
    assert of_prompt("def g(:", "g").names == {"g"}
