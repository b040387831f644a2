"""`rayllm bench`: how fast, offline and served."""

import typer

from rayllm.cli.bench import offline, served

app = typer.Typer(
    no_args_is_help=True,
    help="Measure speed: offline (all work at once) or served (many clients).",
    epilog="Example: `rayllm bench offline smollm2-135m --requests 16`",
)
app.command("offline", epilog=offline.EXAMPLES)(offline.offline)
app.command("serve", epilog=served.EXAMPLES)(served.served)
