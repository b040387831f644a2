"""Everything that a GPU machine can say of the kernels, in under 8 minutes: the tests, then the benchmarks.

    python kernels/gpu.py [OUT]

Needs torch, triton, pytest and numpy; neither Ray nor an installation of rayllm. Writes OUT/tests.txt, OUT/kernels.csv
and OUT/kernels.txt (the same as a table), and prints both; OUT is `gpu-results` unless given. The tests run in several
processes at once, since most of their time is the compiler's, and each benchmark is a process of its own: so a fault of
one leaves the others running.
"""

import argparse
import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "pytest", "numpy")
TEST_PROCESSES = 8  # at most: each keeps a CUDA context
TEST_SECONDS, BENCHMARK_SECONDS = 180, 70  # of all tests; of each of the four benchmarks
COLUMNS = ["op", "case", "kernel", "median_us", "gb_per_s", "tflop_per_s", "ratio", "baseline"]


def run_tests(out: Path, environment: dict[str, str]) -> bool:
    """Without the repository's own settings of pytest, which ask for plugins that a GPU machine may lack."""
    command = [sys.executable, "-m", "pytest", "-c", "kernels/gpu_pytest.ini", "--rootdir", ".", "tests/kernels/gpu"]
    shards = max(1, min(TEST_PROCESSES, os.cpu_count() or 1))
    commands = [[*command, f"--shard={i}/{shards}"] for i in range(shards)]
    ended = run_together(commands, environment, TEST_SECONDS)
    output = b"".join(said for _, said in ended)
    (out / "tests.txt").write_bytes(output)
    print(output.decode(errors="replace"), flush=True)
    return all(status == 0 for status, _ in ended)


def run_together(
    commands: Sequence[Sequence[str]], environment: dict[str, str], seconds: float
) -> list[tuple[int, bytes]]:
    """-> the exit status of each and what it said; those that take longer than `seconds` are killed, and say so."""
    deadline = time.monotonic() + seconds
    ended = []
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i, command in enumerate(commands):
            with (Path(folder) / str(i)).open("wb") as said:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
            running.append(process)
        for i, process in enumerate(running):
            note = b""
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                note = f"\nstopped after {seconds:.0f} s\n".encode()
            ended.append((process.returncode, (Path(folder) / str(i)).read_bytes() + note))
    return ended


def table(rows: list[dict[str, str]]) -> str:
    """Columns as wide as what is in them."""
    lines = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def problem() -> str | None:
    """Why there is nothing to run here."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}; name one that has: make gpu PYTHON=/path/to/python"
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device that torch can use; what needs none runs with `make test`"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, default=Path("gpu-results"), help="a folder")
    out = parser.parse_args().out.resolve()
    if (why := problem()) is not None:
        print(f"error: {why}", file=sys.stderr)
        return 1
    sys.path[:0] = [str(ROOT / "kernels" / "bench")]
    from run import environment, run_all

    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "kernels.csv"
    results.unlink(missing_ok=True)
    passed = run_tests(out, environment() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    failed = run_all(results, quick=True, repeats=None, timeout=BENCHMARK_SECONDS)
    rows = list(csv.DictReader(results.open(newline=""))) if results.exists() else []
    if rows:
        machine = ", ".join(f"{name} {rows[-1][name]}" for name in ("card", "driver", "clocks_mhz", "torch", "triton"))
        text = f"{machine}\n\n{table(rows)}\n"
        (out / "kernels.txt").write_text(text)
        print(text)
    print(f"tests {'passed' if passed else 'FAILED'}, {len(rows)} figures, {time.monotonic() - begin:.0f} s: {out}")
    if failed:
        print(f"benchmarks that failed: {', '.join(failed)}", file=sys.stderr)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
