"""The `rayllm` program: one command per file; nothing heavy is imported before a command runs.

Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted, 143 terminated.
"""

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from rayllm.cli import (
    chat,
    data,
    data_show,
    doctor,
    eval_report,
    generate,
    models,
    parity,
    plan,
    promote,
    quantize,
    rollback,
    serve,
    train,
    train_report,
)
from rayllm.cli import eval as evaluation
from rayllm.cli.bench import app as bench
from rayllm.cli.console import note, set_up_logging
from rayllm.core.errors import RayLLMError

app = typer.Typer(
    name="rayllm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: `rayllm serve smollm2-135m`",
)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("promote", epilog=promote.EXAMPLES)(promote.promote)
app.command("rollback", epilog=rollback.EXAMPLES)(rollback.rollback)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("chat", epilog=chat.EXAMPLES)(chat.chat)
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.command("quantize", epilog=quantize.EXAMPLES)(quantize.quantize)
evaluation.app.command("report", epilog=eval_report.EXAMPLES)(eval_report.report)
app.add_typer(evaluation.app, name="eval")
data.app.command("show", epilog=data_show.EXAMPLES)(data_show.show)
app.add_typer(data.app, name="data")
train.app.command("report", epilog=train_report.EXAMPLES)(train_report.report)
app.add_typer(train.app, name="train")
app.command("parity", epilog=parity.EXAMPLES)(parity.parity)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from rayllm.cli.versions import installed_version

        print(f"rayllm {installed_version('rayllm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log everything, on stderr.")] = False,
) -> None:
    """Serve and run language models on Ray: one command, HTTP and gRPC."""
    set_up_logging(verbose=verbose)


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


def main() -> None:
    # SIGTERM ends Python on the spot; as an exit it unwinds, and what a command had half made is removed, as on Ctrl-C.
    # `serve`, and Ray once it has started, set handlers of their own.
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except RayLLMError as error:
        note(f"error: {error}")
        sys.exit(1)
    except SystemExit as exit_:
        if exit_.code == signal.SIGTERM:  # Ray's handler exits with the bare number of the signal
            sys.exit(128 + signal.SIGTERM)
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:  # `serve`, once it stops, ignores it to the end
            signal.signal(signal.SIGTERM, before)
