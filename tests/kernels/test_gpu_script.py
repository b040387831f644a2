"""`kernels/gpu.py` on a machine without a GPU: what it says, and that its processes share all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def collected(*options: str) -> list[str]:
    done = run("-m", "pytest", "-c", "kernels/gpu_pytest.ini", "--rootdir", ".", "tests/kernels/gpu", "--co", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_help_runs_nothing() -> None:
    done = run("kernels/gpu.py", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: gpu.py")


def test_without_a_gpu_or_torch(tmp_path: Path) -> None:
    done = run("kernels/gpu.py", str(tmp_path / "out"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: no CUDA device")
    bare = run("-S", "-E", "kernels/gpu.py", str(tmp_path / "out"))
    assert bare.returncode == 1
    assert "has no torch, triton, pytest, numpy; name one that has" in bare.stderr
    assert not (tmp_path / "out").exists()


def test_the_shards_are_the_whole() -> None:
    whole = collected()
    parts = [collected(f"--shard={i}/3") for i in range(3)]
    assert sorted(whole) == sorted(test for part in parts for test in part)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("seconds", [60.0, 1.0])
def test_what_runs_too_long_is_killed_and_told(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.syspath_prepend(ROOT / "kernels")
    from gpu import run_together

    commands = [[sys.executable, "-c", f"import time; print('begun', flush=True); time.sleep({s})"] for s in (0, 3)]
    (first, second) = run_together(commands, dict(os.environ), seconds)
    assert first == (0, b"begun\n")
    assert second == ((0, b"begun\n") if seconds > 3 else (-9, b"begun\n\nstopped after 1 s\n"))
