"""`rayllm train report`: one page that shows a run."""

from pathlib import Path
from typing import Annotated

import typer

from rayllm.cli.console import note, print_json
from rayllm.cli.options import Json

EXAMPLES = """
Example: `rayllm train report runs/dpo`
"""


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder: `run` of its configuration.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page. Default: RUN/report.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a run on one HTML page that needs no other file; also while it goes on.

    It shows loss, learning rate, gradient norm, throughput and memory over the steps, whatever else the recipe
    measures (margins and accuracy of preferences, reward against KL), the final figures and the configuration.
    """
    from rayllm.train.report.page import PAGE, write_report

    path = output or run / PAGE
    write_report(run, path)
    if as_json:
        print_json({"path": str(path), "run": str(run)})
        return
    note(f"wrote {path}")
