"""`rayllm bench kernels`."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from rayllm.cli.console import note, print_table
from rayllm.core.errors import ConfigError

EXAMPLES = """
Example: `rayllm bench kernels --output kernels.csv`
"""
SCRIPT = Path(__file__).parents[3] / "kernels" / "bench" / "run.py"
_STDERR = 2  # the descriptor: a process cannot write to what stands for it in Python


def kernels(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the figures here as CSV, with card, clocks and versions."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the cases that a first look needs.")] = False,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Calls that a median is of.")] = None,
) -> None:
    """Time every kernel against torch: those of the GPU if there is one, else those of the CPU.

    Needs a checkout of rayllm: its benchmarks, in kernels/bench, are not part of an installed package.
    """
    if not SCRIPT.exists():
        raise ConfigError(
            f"{SCRIPT} is not there: the kernels' benchmarks come with a checkout of rayllm, not with the installed "
            "package; clone the repository, run `make setup` in it, then this command of its .venv"
        )
    if output is not None:
        _write(output, "", mode="a")  # said before the work
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.csv"
        try:
            failed = _run(path, quick=quick, repeats=repeats)
        finally:  # what an interrupted run has measured stays
            text = path.read_text() if path.exists() else ""
            if output is not None and text:
                _write(output, text, mode="w")
    rows = list(csv.DictReader(text.splitlines()))
    if rows:
        _print(rows)
    if failed:
        note("error: a benchmark failed; what it said is above")
        raise typer.Exit(1)


def _write(output: Path, text: str, *, mode: str) -> None:
    try:
        with output.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output: {output}: {error.strerror}") from None


def _run(path: Path, *, quick: bool, repeats: int | None) -> bool:
    """Figures to `path`, and as they come to stderr -> whether a benchmark failed."""
    import torch

    if not torch.cuda.is_available():
        note("no CUDA device that torch can use: measuring the CPU kernels")
    command = [sys.executable, str(SCRIPT), str(path), *(["--quick"] if quick else [])]
    command += [] if repeats is None else ["--repeats", str(repeats)]
    return subprocess.run(command, stdout=_STDERR).returncode != 0


def _print(rows: list[dict[str, str]]) -> None:
    from rich.table import Table

    machine = [f"{name} {rows[-1][name]}" for name in ("driver", "torch", "triton") if rows[-1][name]]
    table = Table("op", "case", "kernel", title=", ".join([rows[-1]["card"], *machine]))
    for name in ("us", "GB/s", "TFLOP/s", "x", "than"):
        table.add_column(name, justify="left" if name == "than" else "right")
    columns = ("op", "case", "kernel", "median_us", "gb_per_s", "tflop_per_s", "ratio", "baseline")
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    print_table(table)
