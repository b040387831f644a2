"""`rayllm rollback`: the weights that an endpoint had before."""

from typing import Annotated

import typer

from rayllm.cli.options import Json

EXAMPLES = """
Example: `rayllm rollback --url http://gpu-7:8000`
"""


def rollback(
    url: Annotated[str, typer.Option("--url", help="The endpoint's HTTP address.")] = "http://127.0.0.1:8000",
    as_json: Json = False,
) -> None:
    """Return to the weights before the last promotion, or before a canary that is still tried.

    The replicas hold them still, so this takes as long as one step, unless shards were replaced meanwhile. A second
    rollback undoes the first.
    """
    from rayllm.cli.promotion import change_weights

    change_weights(url, "/admin/rollback", {}, as_json=as_json)
