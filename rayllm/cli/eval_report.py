"""`rayllm eval report`: one page that compares runs."""

from pathlib import Path
from typing import Annotated

import typer

from rayllm.cli.console import note, print_json
from rayllm.cli.options import Json

EXAMPLES = """
Example: `rayllm eval report runs/bf16 runs/int8 --output int8.html`
"""


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs (--output); the first one is the baseline.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Compare runs on one HTML page that needs no other file.

    It shows each metric with its standard error, paired differences with their confidence intervals, bars by subject,
    calibration of multiple choice, and the samples that changed.
    """
    from rayllm.eval.report.page import write_report

    write_report(runs, output)
    if as_json:
        print_json({"path": str(output), "runs": [str(run) for run in runs]})
        return
    note(f"wrote {output}")
