"""Everything that a GPU machine can say of the kernels, in under 8 minutes: the tests, then the benchmarks.

    python kernels/gpu.py [OUT]

Needs torch, triton, pytest and numpy; neither Ray nor an installation of rayllm. Writes OUT/tests.txt, OUT/kernels.csv
and OUT/kernels.txt (the same as a table), and prints both; OUT is `gpu-results` unless given. The tests and each
benchmark are processes of their own, so that a fault of one leaves the others running.
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels" / "bench")]
from run import environment, run_all  # noqa: E402

TEST_SECONDS, BENCHMARK_SECONDS = 240, 75
COLUMNS = ["op", "case", "kernel", "median_us", "gb_per_s", "tflop_per_s", "ratio", "baseline"]


def run_tests(out: Path) -> bool:
    """Without the repository's own settings of pytest, which ask for plugins that a GPU machine may lack."""
    command = [sys.executable, "-m", "pytest", "-c", "kernels/gpu_pytest.ini", "--rootdir", ".", "tests/kernels/gpu"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TEST_SECONDS,
        )
        output, passed = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as stopped:
        output, passed = (stopped.stdout or b"") + f"\nstopped after {TEST_SECONDS} s\n".encode(), False
    (out / "tests.txt").write_bytes(output)
    print(output.decode(errors="replace"), flush=True)
    return passed


def table(rows: list[dict[str, str]]) -> str:
    """Columns as wide as what is in them."""
    lines = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-results").resolve()
    if not torch.cuda.is_available():
        print("error: no CUDA device that torch can use; what needs none runs with `make test`", file=sys.stderr)
        return 1
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "kernels.csv"
    results.unlink(missing_ok=True)
    passed = run_tests(out)
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
