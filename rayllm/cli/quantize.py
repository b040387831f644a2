"""`rayllm quantize`: a model with int8 linear layers, as a directory that rayllm, transformers and vLLM read."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rayllm.cli.console import note, print_json, print_table, progress, stdout_kept_clean
from rayllm.cli.options import Json, Model
from rayllm.cli.units import format_bytes
from rayllm.core.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:  # these bring torch
    from torch import Tensor

    from rayllm.models.checkpoint import Checkpoint
    from rayllm.quant.calibrate import InputStatistics
    from rayllm.quant.convert import Recipe, Report

EXAMPLES = """
Example: `rayllm quantize smollm2-135m ./smollm2-w8a16 --scheme w8a16`

Example: `rayllm quantize ./my-model ./my-model-w8a8 --scheme w8a8 --outliers smooth --calibration text.txt`
"""
_SEQUENCE = 512  # tokens of the calibration text that the model sees at a time
_LEAST_TOKENS = _SEQUENCE  # fewer say little of what inputs a layer can have
_MOST_TOKENS = 32 * _SEQUENCE


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make; it must not be there yet.")],
    scheme: Annotated[
        Literal["w8a16", "w8a8"],
        typer.Option("--scheme", help="w8a16: int8 weights; w8a8: int8 activations too, token by token."),
    ] = "w8a16",
    outliers: Annotated[
        Literal["none", "clip", "smooth", "mixed"] | None,
        typer.Option(
            "--outliers",
            help="What to do about values far larger than the rest. clip: cut weights where that costs least; smooth:"
            " move the spread of activations into the weights (needs --calibration); mixed: keep such columns in 16"
            " bits, finding those of activations by --calibration. [smooth with --calibration, else none]",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="UTF-8 text such as the model will see: some pages of it, 512 tokens at least.",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="LAYER",
            help="Leave these layers as they are: lm_head, down_proj, model.layers.0.*; repeatable.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a model's linear layers to int8, one scale for each output.

    Halves the memory of 16-bit weights. OUT is complete or not there; it also holds a report of the error that each
    layer got (quantization_report.json) and a picture of its weights' range (weight_ranges.png).
    """
    from rayllm.quant.convert import Recipe

    outliers = outliers or ("none" if calibration is None else "smooth")
    recipe = Recipe(scheme=scheme, outliers=outliers, skip=tuple(skip or ()))
    if recipe.needs_calibration and calibration is None:
        raise ConfigError(f"outliers: {outliers} needs --calibration FILE, a text such as the model will see")
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already; name a directory to be made")
    with stdout_kept_clean():
        report = _quantize(model, out, recipe, calibration)
    from rayllm.quant.report import as_json as numbers

    if as_json:
        print_json({"model": model, "directory": str(out), **numbers(report)})
    else:
        _print(report, out)


def _quantize(model: str, out: Path, recipe: "Recipe", calibration: Path | None) -> "Report":
    from rayllm.models.cache import publish
    from rayllm.models.checkpoint import Checkpoint
    from rayllm.models.hub import resolve_model
    from rayllm.quant.convert import check_weights, convert, quantized_layers
    from rayllm.quant.outliers import split_groups
    from rayllm.quant.report import write_report

    checkpoint = Checkpoint.open(resolve_model(model))
    layers = quantized_layers(checkpoint, recipe)
    if split := split_groups(checkpoint.spec, layers):
        note(f"vLLM will not load it: it wants all of {', '.join(split[0])} in int8, or none")
    statistics, tokens = None, 0
    with publish(out.absolute()) as directory:
        if calibration is not None:
            sequences = _sequences(checkpoint, calibration)
            tokens = sum(map(len, sequences))
            check_weights(checkpoint)
            statistics = _calibrate(checkpoint, sequences, tokens)
        with progress("quantizing", 2 * len(layers)) as advance:
            report = convert(
                checkpoint, directory, recipe, statistics=statistics, calibration_tokens=tokens, advance=advance
            )
        write_report(report, directory)
    return report


def _sequences(checkpoint: "Checkpoint", calibration: Path) -> "list[Tensor]":
    """The text's first tokens, in pieces."""
    import torch

    from rayllm.core.tokenizer import Tokenizer

    try:
        text = calibration.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"calibration: {calibration}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"calibration: {calibration}: is not UTF-8 text") from None
    try:
        ids = Tokenizer.load(checkpoint.directory).encode(text)[:_MOST_TOKENS]
    except InvalidRequestError as error:
        raise ConfigError(f"calibration: {calibration}: {error.problem}") from None
    if len(ids) < _LEAST_TOKENS:
        raise ConfigError(
            f"calibration: {calibration}: is a text of {len(ids)} tokens; at least {_LEAST_TOKENS} are needed, and"
            f" {_MOST_TOKENS:,} are used"
        )
    length = min(_SEQUENCE, checkpoint.spec.max_position_embeddings)
    return [torch.tensor(ids[first : first + length]) for first in range(0, len(ids), length)]


def _calibrate(checkpoint: "Checkpoint", sequences: "list[Tensor]", tokens: int) -> "dict[str, InputStatistics]":
    import torch

    from rayllm.engine.model_runner import resolve_device, resolve_dtype
    from rayllm.parallel.load import load_shard
    from rayllm.parallel.mesh import Mesh
    from rayllm.quant.calibrate import calibrate

    device = resolve_device("auto")
    dtype = resolve_dtype("auto", checkpoint, device)
    model = load_shard(checkpoint, Mesh.single(), dtype=dtype, device=device)
    with progress("calibrating", tokens) as advance:
        found = calibrate(model, [sequence.to(device) for sequence in sequences], advance=advance)
    for layer, statistics in found.items():
        if not torch.isfinite(statistics.largest_K).all():
            raise ConfigError(f"calibration: the inputs of {layer} are not finite on this text")
    return dict(found)


def _print(report: "Report", out: Path) -> None:
    from rich.table import Table

    from rayllm.quant.report import as_json as numbers

    facts = numbers(report)
    before, after = report.bytes_before, report.bytes_after
    table = Table("", str(out))
    table.add_row("weights", f"{format_bytes(before)} -> {format_bytes(after)} ({after / before:.0%})")
    table.add_row("layers in int8", f"{len(report.layers)}")
    table.add_row("columns kept in 16 bits", f"{sum(layer.outlier_columns for layer in report.layers)}")
    if any(layer.needs_outliers for layer in report.layers):
        table.add_row("read by", "rayllm alone: int8 cannot hold these columns beside the others")
    table.add_row(f"mean error of {facts['error_of']}", f"{facts['mean_error']:.2%}")
    table.add_row("largest", f"{facts['worst_error']:.2%} in {facts['worst_layer']}")
    print_table(table)
