"""`rayllm parity`: whether serving computes what training computes."""

import dataclasses
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayllm.cli.console import note, print_json, print_table, progress, stdout_kept_clean
from rayllm.cli.options import Json, Model
from rayllm.core.config import DTYPES
from rayllm.core.errors import ConfigError

if TYPE_CHECKING:  # brings torch
    from rayllm.train.parity import Parity, PathResult

EXAMPLES = """
Example: `rayllm parity smollm2-135m --tp 1,3 --pp 1,2 --dtype float32`

Example: `rayllm parity runs/sft/checkpoints/step-00001000 --int8 --prompts prompts.txt --json`
"""


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of sizes such as 1,2")
    return list(dict.fromkeys(sizes))


def parity(
    model: Model,
    tp: Annotated[
        str, typer.Option("--tp", metavar="N,...", help="Tensor parallel sizes, each with each of --pp.")
    ] = "1",
    pp: Annotated[str, typer.Option("--pp", metavar="N,...", help="Pipeline parallel sizes.")] = "1",
    dtype: Annotated[
        str, typer.Option("--dtype", help=f"Of training's computation and the engine's: {', '.join(DTYPES)}.")
    ] = "auto",
    int8: Annotated[
        bool, typer.Option("--int8", help="Also serve int8 weights, W8A16 and W8A8, made as they are read.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="UTF-8 text, prompts with a blank line between [built in]."),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option(
            "--bound", help="Most that a token's log-probability may differ, in nats, in place of the defaults.", min=0
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the log-probabilities of the engine with those of the training forward, token by token.

    Paths: prefill, decoding (greedy and sampled), a prefix from the cache, chunked prefill, preemption. Exit status 1
    if any of them differs too much. Defaults, for one token and for the mean over all: float32 1e-4; bfloat16 and
    float16 1 and 0.1; W8A16 1.5 and 0.2; W8A8 4 and 0.5, about twice what SmolLM2-135M gives. `kl` is
    KL(engine || training) of the 20 likeliest tokens and of all others as one, the mean over tokens.
    """
    sizes = list(product(_sizes(tp), _sizes(pp)))
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    texts = None if prompts is None else _read(prompts)
    with stdout_kept_clean():
        comparison = _prepare(model, sizes, int8, dtype, texts)
        results = _run(comparison, bound)
    failed = [result for result in results if not result.ok]
    if as_json:
        print_json(
            {
                "model": model,
                "dtype": str(comparison.dtype).removeprefix("torch."),
                "prompt_tokens": [len(prompt) for prompt in comparison.prompts],
                "ok": not failed,
                "results": [_as_json(result) for result in results],
            }
        )
    else:
        _print(results)
    if failed:
        worst = max(failed, key=lambda result: result.gap.max_abs_diff / result.bound.max_abs_diff)
        note(
            f"error: serving differs from training on {len(failed)} of {len(results)} paths; most in {worst.path},"
            f" {worst.layout.name}: a token by {worst.gap.max_abs_diff:.3g} (bound {worst.bound.max_abs_diff:g}), the"
            f" mean by {worst.gap.mean_abs_diff:.3g} (bound {worst.bound.mean_abs_diff:g})"
        )
        raise typer.Exit(1)


def _prepare(model: str, sizes: list[tuple[int, int]], int8: bool, dtype: str, texts: list[str] | None) -> "Parity":
    from rayllm.models.checkpoint import Checkpoint
    from rayllm.models.hub import resolve_model
    from rayllm.train.parity import INT8_SCHEMES, Layout, Parity

    schemes = (None, *INT8_SCHEMES) if int8 else (None,)
    layouts = [
        Layout(tensor=tensor, pipeline=pipeline, quantize=scheme) for scheme in schemes for tensor, pipeline in sizes
    ]
    return Parity(Checkpoint.open(resolve_model(model)), layouts, dtype=dtype, texts=texts)


def _run(comparison: "Parity", bound: float | None) -> "list[PathResult]":
    from rayllm.train.parity import PATHS

    with progress("comparing", len(PATHS) * len(comparison.layouts)) as advance:
        return comparison.run(bound, on_result=lambda _: advance(1))


def _read(prompts: Path) -> list[str]:
    try:
        text = prompts.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"prompts: {prompts}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"prompts: {prompts}: is not UTF-8 text") from None
    texts = [part.strip("\n") for part in text.split("\n\n") if part.strip()]
    if not texts:
        raise ConfigError(f"prompts: {prompts}: holds no text")
    return texts


def _as_json(result: "PathResult") -> dict[str, Any]:
    return {
        "tp": result.layout.tensor,
        "pp": result.layout.pipeline,
        "quantize": result.layout.quantize,
        "path": result.path,
        **dataclasses.asdict(result.gap),
        "bound": dataclasses.asdict(result.bound),
        "ok": result.ok,
    }


def _print(results: "list[PathResult]") -> None:
    from rich.table import Table

    table = Table("layout", "path", "tokens", "max |diff|", "mean |diff|", "argmax differs", "KL", "")
    for result in results:
        gap = result.gap
        table.add_row(
            result.layout.name,
            result.path,
            str(gap.tokens),
            f"{gap.max_abs_diff:.2e}",
            f"{gap.mean_abs_diff:.2e}",
            str(gap.argmax_mismatches),
            f"{gap.kl:.2e}",
            "ok" if result.ok else "TOO FAR",
        )
    print_table(table)
