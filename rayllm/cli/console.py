"""Where a command writes: its result on stdout, everything else (logs, progress, errors) on stderr."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def set_up_logging(*, verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("rayllm").setLevel(logging.DEBUG if verbose else logging.INFO)


def print_json(result: Mapping[str, object]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def print_table(table: "Table") -> None:
    """On stdout, never narrower than its text when stdout is a file."""
    from rich.box import SIMPLE
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160
    table.box = SIMPLE
    console.print(table)


def note(message: str) -> None:
    """A line for the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Whatever a library prints on stdout inside goes to stderr, so that stdout holds the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, silent where stderr is no terminal; yields `advance(steps)`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # redirect_stdout is off: results and streamed answers go to stdout themselves
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False) as bars:
        task = bars.add_task(description, total=total)
        yield lambda steps: bars.advance(task, steps)
