"""`rayllm bench`: how fast: offline, served, and kernel by kernel."""

import typer

from rayllm.cli.bench import kernels, offline, served

app = typer.Typer(
    no_args_is_help=True,
    help="Measure speed: offline (all work at once), served (many clients), or of each kernel.",
    epilog="Example: `rayllm bench offline smollm2-135m --requests 16`",
)
app.command("offline", epilog=offline.EXAMPLES)(offline.offline)
app.command("serve", epilog=served.EXAMPLES)(served.served)
app.command("kernels", epilog=kernels.EXAMPLES)(kernels.kernels)
