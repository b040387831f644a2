"""`rayllm bench serve`."""

import asyncio
from typing import Annotated, Any

import typer

from rayllm.cli.console import print_json, print_table, progress, stdout_kept_clean
from rayllm.cli.options import EngineOptions, Json, expand
from rayllm.core.config import EngineConfig
from rayllm.core.errors import RayLLMError

EXAMPLES = """
Example: `rayllm bench serve --url http://localhost:8000 --concurrency 8 --requests 64 --json`
"""


@expand
def served(
    engine: EngineOptions,
    url: Annotated[
        str | None, typer.Option("--url", help="A running server: http://localhost:8000 or grpc://localhost:9000.")
    ] = None,
    in_process: Annotated[
        str | None,
        typer.Option("--in-process", metavar="MODEL", help="Instead: the bare engine, to tell what serving costs."),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Clients; each waits for its answer.")] = 8,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests in all.")] = 64,
    input_len: Annotated[int, typer.Option("--input-len", min=1, help="Tokens of each prompt (random ones).")] = 128,
    output_len: Annotated[int, typer.Option("--output-len", min=1, help="Tokens of each answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Measure a running server as its clients see it: time to the first token (TTFT), between tokens, and in all.

    Answers are greedy and have exactly --output-len tokens. A request of each client warms the server up and is not
    counted. The engine's options matter with --in-process only.
    """
    if (url is None) == (in_process is None):
        raise typer.BadParameter("give either --url or --in-process")
    if url is not None:
        engine.refuse_with_url()
    workload = {"concurrency": concurrency, "requests": requests, "input_len": input_len, "output_len": output_len}
    target = engine.config(in_process) if url is None else url
    with stdout_kept_clean():
        result = asyncio.run(_measure(target, workload))
    if result["errors"] == requests:
        raise RayLLMError(f"every request failed: {next(iter(result['error_messages']))}")
    if as_json:
        from rayllm.cli.versions import versions

        print_json(
            result | {"settings": {"target": url or in_process, **workload}, "versions": versions("torch", "ray")}
        )
    else:
        _print(str(url or in_process), result)


async def _measure(target: str | EngineConfig, workload: dict[str, int]) -> dict[str, Any]:
    from rayllm.cli.bench.load import run_load, summarize
    from rayllm.cli.bench.statistics import random_prompts
    from rayllm.cli.bench.transports import EngineTransport, connect

    transport = await connect(target) if isinstance(target, str) else EngineTransport(target)
    output_len, concurrency = workload["output_len"], workload["concurrency"]
    prompts = random_prompts(concurrency + workload["requests"], workload["input_len"], seed=0)
    try:
        with progress("requests", len(prompts)) as advance:
            warm_up, counted = prompts[:concurrency], prompts[concurrency:]
            await run_load(transport, warm_up, output_len=output_len, concurrency=concurrency, on_done=advance)
            records, duration_s = await run_load(
                transport, counted, output_len=output_len, concurrency=concurrency, on_done=advance
            )
    finally:
        await transport.close()
    return summarize(records, duration_s, input_len=workload["input_len"])


def _print(target: str, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("milliseconds", "p50", "p90", "p99", "mean", "max", title=target)
    for label, name in (
        ("first token (TTFT)", "ttft_ms"),
        ("between tokens", "inter_token_ms"),
        ("whole answer", "end_to_end_ms"),
    ):
        if (figures := result[name]) is not None:
            table.add_row(label, *(f"{figures[column]:,.1f}" for column in ("p50", "p90", "p99", "mean", "max")))
    print_table(table)
    print(
        f"{result['output_tokens_per_s']:,.1f} output tokens/s, {result['total_tokens_per_s']:,.1f} total tokens/s,"
        f" {result['errors']} errors in {result['requests']} requests, {result['duration_s']:.1f} s"
    )
    for message, count in result["error_messages"].items():
        print(f"{count} x {message}")
