"""`rayllm bench offline`."""

from typing import Annotated, Any

import typer

from rayllm.cli.console import print_json, print_table, progress, stdout_kept_clean
from rayllm.cli.options import EngineOptions, Json, Model, expand
from rayllm.core.config import EngineConfig

EXAMPLES = """
Example: `rayllm bench offline smollm2-135m --requests 16 --input-len 128 --output-len 64 --json`
"""


@expand
def offline(
    model: Model,
    engine: EngineOptions,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests, all handed over at once.")] = 16,
    input_len: Annotated[int, typer.Option("--input-len", min=1, help="Tokens of each prompt (random ones).")] = 128,
    output_len: Annotated[int, typer.Option("--output-len", min=2, help="Tokens of each answer.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured rounds; the median counts.")] = 5,
    against_transformers: Annotated[
        bool, typer.Option("--against-transformers", help="Time transformers' generate too, in turns with rayllm.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time prefill and decode of a model in this process, in tokens per second over all requests."""
    config = engine.config(model)
    workload = {"requests": requests, "input_len": input_len, "output_len": output_len, "repeats": repeats}
    with stdout_kept_clean():
        speeds = _measure(config, workload, against_transformers=against_transformers)
    if as_json:
        print_json(_as_json(config, workload, speeds))
    else:
        _print(model, workload, speeds)


def _measure(
    config: EngineConfig, settings: dict[str, int], *, against_transformers: bool
) -> dict[str, dict[str, Any]]:
    from rayllm.cli.bench.engines import rayllm_run, transformers_run
    from rayllm.cli.bench.throughput import Workload, compare, speeds
    from rayllm.engine.llm import LLM

    repeats = settings["repeats"]
    workload = Workload(
        requests=settings["requests"], input_len=settings["input_len"], output_len=settings["output_len"]
    )
    with LLM.from_config(config) as llm:
        engines = {"rayllm": rayllm_run(llm)}
        if against_transformers:
            engines["transformers"] = transformers_run(config.model.model, config.model.dtype)
        with progress("measuring", (repeats + 1) * len(engines)) as advance:
            timings = compare(engines, workload, repeats=repeats, on_done=advance)
    return {name: speeds(timing, workload) for name, timing in timings.items()}


def _as_json(config: EngineConfig, workload: dict[str, int], speeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """rayllm's figures at the top; those of transformers, if any, under its name."""
    from rayllm.cli.versions import versions

    result = dict(speeds["rayllm"])
    if (other := speeds.get("transformers")) is not None:
        result["transformers"] = other
        result["decode_speedup"] = result["decode_tokens_per_s"] / other["decode_tokens_per_s"]
    engine = {
        "model": config.model.model,
        "dtype": config.model.dtype,
        "tp": config.parallel.tensor,
        "pp": config.parallel.pipeline,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
    }
    return result | {"settings": engine | workload, "versions": versions("torch", "transformers")}


def _print(model: str, workload: dict[str, int], speeds: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("tokens per second", *speeds)
    table.title = "{}: {requests} x ({input_len} in, {output_len} out), median of {repeats}".format(model, **workload)
    for name in ("prefill", "decode", "total"):
        table.add_row(name, *(f"{figures[f'{name}_tokens_per_s']:,.1f}" for figures in speeds.values()))
    print_table(table)
