"""`rayllm doctor`: whether the ranks of a model could work together, and if not, why."""

import dataclasses
from typing import Annotated

import typer

from rayllm.cli.console import note, print_json, print_table, stdout_kept_clean
from rayllm.cli.options import Json
from rayllm.core.errors import ConfigError

EXAMPLES = """
Example: `rayllm doctor --tp 2`

Example: `rayllm doctor --tp 4 --pp 2 --gpus --address 10.0.0.1:6379`
"""


def doctor(
    tp: Annotated[int, typer.Option("--tp", help="Tensor parallel ranks.", min=1)] = 1,
    pp: Annotated[int, typer.Option("--pp", help="Pipeline parallel stages.", min=1)] = 1,
    gpus: Annotated[bool, typer.Option("--gpus", help="Give each rank a GPU.")] = False,
    address: Annotated[
        str | None, typer.Option("--address", help="The Ray cluster [RAY_ADDRESS, else one started here].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Place a model's ranks as serving does, without a model, and check what they need of each other.

    For every rank: its address and network interface, whether it reaches rank 0, the rendezvous of torch.distributed,
    clock, memory, shared memory and GPU. Exit status 1 if anything is wrong.
    """
    with stdout_kept_clean():
        from rayllm_cluster.diagnosis import diagnose
        from rayllm_cluster.errors import ClusterError
        from rayllm_cluster.examine import examine
        from rayllm_cluster.placement import plan_placement
        from rayllm_cluster.session import Session

        shard = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}
        try:
            with Session.start(address=address, num_cpus=tp * pp):
                findings = diagnose(examine(plan_placement(tp, pp, shard=shard)))
        except ClusterError as error:
            raise ConfigError(str(error)) from error
    problems = [finding for finding in findings if finding.problem is not None]
    if as_json:
        print_json({"healthy": not problems, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        from rich.table import Table

        table = Table("rank", "node", "check", "", "what was seen")
        for finding in findings:
            verdict = "ok" if finding.problem is None else "WRONG"
            table.add_row(str(finding.rank), finding.node, finding.check, verdict, finding.problem or finding.seen)
        print_table(table)
    if problems:
        note(f"{len(problems)} of {len(findings)} checks found something wrong")
        raise typer.Exit(1)
