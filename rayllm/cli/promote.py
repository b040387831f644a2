"""`rayllm promote`: other weights for a running endpoint."""

from pathlib import Path
from typing import Annotated

import typer

from rayllm.cli.options import Json
from rayllm.cli.units import parse_share
from rayllm.core.errors import ConfigError

EXAMPLES = """
Example: `rayllm promote runs/sft/checkpoints/step-00000500`

Example: `rayllm promote ./new --url http://gpu-7:8000 --canary 10% --gate held-out.txt`
"""


def promote(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A Hugging Face directory, at the same place on every node; it must stay."
        ),
    ],
    url: Annotated[str, typer.Option("--url", help="The endpoint's HTTP address.")] = "http://127.0.0.1:8000",
    canary: Annotated[
        str | None,
        typer.Option("--canary", metavar="SHARE", help="The share of replicas to have them first, such as 10%."),
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(
            "--gate",
            metavar="FILE",
            help="A text whose perplexity may rise by 1 % at most; measured before the first replica serves them.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Change the weights of a running endpoint, without a restart.

    They must be of the very model that runs: only the weights may be new. Running requests end with the weights that
    they began with, new ones get the new weights, and every answer says which. A checkpoint that is damaged, does not
    fit, or does not pass the gate changes nothing, and so does Ctrl-C.

    With --canary alone only that share of the replicas (one at least) changes; promote again without it, or roll back.
    With --canary and --gate the other replicas follow once the gate is passed.
    """
    from rayllm.cli.promotion import change_weights

    body = {"checkpoint": str(checkpoint.resolve())}
    share = None if canary is None else parse_share(canary)
    text = None if gate is None else _read(gate)
    change_weights(url, "/admin/promote", body | {"canary": share, "gate": text}, as_json=as_json)


def _read(gate: Path) -> str:
    try:
        return gate.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gate: {gate} cannot be read as text: {error}") from None
