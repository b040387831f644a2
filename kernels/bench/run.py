"""Run all benchmarks of this machine, each in a process of its own, and gather their rows in one CSV.

    python kernels/bench/run.py results.csv

A benchmark that fails does not stop the others; the exit status says that one did. Needs torch, and triton on a GPU.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"run", "timing"}
ONLY_ON = {"cpu_decode": "cpu", "paged_attention": "cuda", "flash_attention": "cuda"}


def benchmarks(device: str) -> list[Path]:
    scripts = sorted(path for path in HERE.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    return [path for path in scripts if ONLY_ON.get(path.stem, device) == device]


def environment() -> dict[str, str]:
    """Of a process that uses the kernels of this checkout, where nothing is installed but torch, too."""
    paths = [str(HERE.parents[1]), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("numba") is None:
        paths.append(str(HERE.parent / "stand_ins"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def run_all(csv: Path, *, quick: bool, repeats: int | None, timeout: float | None) -> list[str]:
    """-> the names of the benchmarks that failed; `timeout`: seconds for each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["--device", device, "--csv", str(csv), *(["--quick"] if quick else [])]
    options += [] if repeats is None else ["--repeats", str(repeats)]
    failed = []
    for script in benchmarks(device):
        try:
            command = [sys.executable, str(script), *options]
            status = subprocess.run(command, env=environment(), timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            print(f"{script.stem}: stopped after {timeout:.0f} s", file=sys.stderr, flush=True)
            status = 1
        if status != 0:
            failed.append(script.stem)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="where the rows go; what is there already is replaced")
    parser.add_argument("--quick", action="store_true", help="only the cases that a first look needs")
    parser.add_argument("--repeats", type=int, help="calls a figure is the median of")
    given = parser.parse_args()
    given.csv.unlink(missing_ok=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    failed = run_all(given.csv, quick=given.quick, repeats=given.repeats, timeout=None)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
