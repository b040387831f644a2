"""`rayllm plan`: the memory arithmetic of a model, shown step by step."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rayllm.cli.console import print_json, print_table
from rayllm.cli.options import Json
from rayllm.cli.planning import ADAMW_BYTES_PER_PARAM, DTYPE_BYTES, MemoryPlan, ModelPlan, WeightFormat, plan_model
from rayllm.cli.units import format_bytes, parse_bytes, parse_count
from rayllm.core.config import CacheConfig
from rayllm.core.errors import ConfigError

if TYPE_CHECKING:
    from rayllm.models.spec import DecoderSpec

EXAMPLES = """
Example: rayllm plan --params 175e9 --dtype bfloat16 --gpu-memory 80GB

Example: rayllm plan ./my-model --gpu-memory 24GB --context 4096

Example: rayllm plan ./my-model --gpu-memory 24GB --quantize w8a8 --kv-cache-dtype int8
"""


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A Hugging Face directory or a fetched model; only its config.json is read."
        ),
    ] = None,
    params: Annotated[
        int | None,
        typer.Option("--params", parser=parse_count, metavar="COUNT", help="Without a directory: 175e9, 7B, 135M."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the weights and the KV cache.")
    ] = "bfloat16",
    quantize: Annotated[
        Literal["w8a16", "w8a8"] | None,
        typer.Option("--quantize", help="Linear layers in int8, as `rayllm serve --quantize` makes them."),
    ] = None,
    kv_cache_dtype: Annotated[
        Literal["auto", "int8"],
        typer.Option("--kv-cache-dtype", help="int8: a byte for each value, and a scale for each token and head."),
    ] = "auto",
    gpu_memory: Annotated[
        int,
        typer.Option("--gpu-memory", parser=parse_bytes, metavar="SIZE", help="Memory of one GPU: 80GB, 24GiB."),
    ] = "80GB",  # type: ignore[assignment]  # typer parses the default like an argument
    gpu_memory_fraction: Annotated[
        float,
        typer.Option("--gpu-memory-fraction", min=0.01, max=1.0, help="Share of it for weights and KV cache."),
    ] = CacheConfig().gpu_memory_fraction,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens in a sequence (the model's longest).")
    ] = None,
    max_gpus: Annotated[
        int | None,
        typer.Option("--max-gpus", min=1, max=4096, help="Largest layout to list (8, or what the weights need)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Work out the memory a model needs, how many GPUs that takes, and how to split it over them.

    Nothing is loaded. With MODEL you also get the KV cache of a token, the largest batch and context that fit, and
    every tensor x pipeline parallel layout that divides the model evenly.
    """
    if (model is None) == (params is None):
        raise typer.BadParameter("give either MODEL or --params")
    form = WeightFormat(dtype=dtype, int8=quantize is not None)
    if model is None:
        assert params is not None
        memory, details = MemoryPlan(num_params=params, form=form, gpu_bytes=gpu_memory), None
    else:
        details = plan_model(
            _spec(model),
            form=form,
            kv_dtype="int8" if kv_cache_dtype == "int8" else dtype,
            gpu_bytes=gpu_memory,
            fraction=gpu_memory_fraction,
            context=context,
            max_gpus=max_gpus,
        )
        memory = details.memory
    if as_json:
        print_json(memory.as_json() | (details.as_json() if details is not None else {}))
        return
    _print_memory(memory, details)
    if details is not None:
        _print_layouts(details)


def _spec(model: str) -> "DecoderSpec":
    from rayllm.cli.model_config import read_config
    from rayllm.models.families import spec_from_config
    from rayllm.models.quantization import read_quantization

    config = read_config(model)
    if read_quantization(config) is not None:
        raise ConfigError(f"{model} is an int8 checkpoint; plan for the model that it was made of, with --quantize")
    return spec_from_config(config)


def _print_memory(memory: MemoryPlan, details: ModelPlan | None) -> None:
    from rich.table import Table

    table = Table("what", "arithmetic", "result", title="Memory")
    gpu = format_bytes(memory.gpu_bytes)
    table.add_row("weights", _weights(memory), format_bytes(memory.weights_bytes))
    table.add_row("GPUs for the weights", f"{format_bytes(memory.weights_bytes)} / {gpu}, rounded up", f"{memory.gpus}")
    if details is not None:
        spec, best = details.spec, details.best
        table.add_row(
            "KV cache of a token",
            f"2 (K, V) x {spec.num_layers} layers x {spec.num_kv_heads} KV heads x {_head(details)}",
            f"{details.kv_bytes_per_token:,} bytes",
        )
        table.add_row(
            f"KV cache of {details.context:,} tokens",
            f"{details.context:,} x {details.kv_bytes_per_token:,} bytes",
            format_bytes(details.context * details.kv_bytes_per_token),
        )
        if best is not None:
            table.add_row(
                f"room for KV (TP {best.tp} x PP {best.pp})",
                f"each GPU: {gpu} x {details.fraction:g} - {format_bytes(best.weights_bytes)} weights",
                format_bytes(best.kv_room_bytes),
            )
            table.add_row(
                "tokens that fit",
                f"{format_bytes(best.kv_room_bytes)} / {best.kv_bytes_per_token:,} bytes",
                f"{best.max_tokens:,}",
            )
            table.add_row(
                f"largest batch at {details.context:,}",
                f"{best.max_tokens:,} / {details.context:,}, rounded down",
                f"{best.max_batch(details.context):,}",
            )
    table.add_row(
        "training state",
        f"{memory.num_params:,} x {ADAMW_BYTES_PER_PARAM} bytes"
        " (16-bit weights 2 + gradients 2, float32 master 4 + two AdamW moments 8)",
        f"{format_bytes(memory.training_bytes)} = {_gpus(memory.training_gpus)}",
    )
    if details is not None:
        stored = format_bytes(details.activation_bytes(recompute=False))
        recomputed = format_bytes(details.activation_bytes(recompute=True))
        table.add_row(
            "training activations",
            f"34 bytes x {details.context:,} tokens x {details.spec.hidden_size} x {details.spec.num_layers} layers"
            " (2 bytes with recomputation)",
            f"{stored} ({recomputed})",
        )
    print_table(table)


def _weights(memory: MemoryPlan) -> str:
    params = f"{memory.num_params:,} parameters"
    if not memory.form.int8:
        return f"{params} x {memory.form.dtype_bytes} bytes ({memory.form.dtype})"
    if memory.shape_bytes is None:
        return f"{params} x 1 byte (int8; scales not counted)"
    return f"{params}: linear layers 1 byte and 4 for each output (int8), others {memory.form.dtype_bytes}"


def _head(details: ModelPlan) -> str:
    if details.kv_dtype == "int8":
        return f"({details.spec.head_dim} + 4 bytes of scale)"
    return f"{details.spec.head_dim} x {DTYPE_BYTES[details.kv_dtype]} bytes"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _print_layouts(details: ModelPlan) -> None:
    from rich.table import Table

    table = Table(
        "TP",
        "PP",
        "GPUs",
        "weights per GPU",
        "KV of a token per GPU",
        "tokens that fit",
        f"batch at {details.context:,}",
    )
    table.title = "Layouts that divide evenly"
    for layout in details.layouts:
        copies = f" ({layout.kv_copies} copies)" if layout.kv_copies > 1 else ""
        table.add_row(
            str(layout.tp),
            str(layout.pp),
            str(layout.gpus),
            format_bytes(layout.weights_bytes),
            f"{layout.kv_bytes_per_token:,} bytes{copies}",
            f"{layout.max_tokens:,}" if layout.kv_room_bytes > 0 else "weights do not fit",
            f"{layout.max_batch(details.context):,}",
        )
    print_table(table)
