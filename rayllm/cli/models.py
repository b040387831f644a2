"""`rayllm models`: what can be served by name, and what a model is made of."""

from typing import Annotated

import typer

from rayllm.cli.console import print_json, print_table
from rayllm.cli.options import Json
from rayllm.cli.planning import DTYPE_BYTES
from rayllm.cli.units import format_bytes

app = typer.Typer(
    no_args_is_help=True,
    help="List, fetch and inspect models.",
    epilog="Example: `rayllm models fetch smollm2-135m`",
)


@app.command("list", epilog="Example: `rayllm models list`")
def list_models(as_json: Json = False) -> None:
    """List the models that can be fetched by a short name, and where those on this machine lie."""
    from rayllm.models.embedded import EMBEDDED

    rows = [
        {
            "name": model.name,
            "description": model.description,
            "download_bytes": model.download_bytes,
            "directory": str(model.directory) if model.is_fetched else None,
        }
        for model in EMBEDDED.values()
    ]
    if as_json:
        print_json({"models": rows})
        return
    from rich.table import Table

    table = Table("name", "what it is", "download", "directory")
    for model in EMBEDDED.values():
        directory = str(model.directory) if model.is_fetched else "not fetched yet"
        table.add_row(model.name, model.description, format_bytes(model.download_bytes), directory)
    print_table(table)


@app.command("fetch", epilog="Example: `rayllm models fetch smollm2-135m`")
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `rayllm models list`, or a hub name.")],
    as_json: Json = False,
) -> None:
    """Download a model once, check it, and convert it to a Hugging Face directory in your cache.

    Prints the directory. `rayllm serve NAME` does the same when the model is not there yet.
    """
    from rich.console import Console
    from rich.progress import Progress

    from rayllm.models.hub import resolve_model

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, redirect_stdout=False) as bar:
        task = bar.add_task("fetch", total=1.0)
        directory = resolve_model(name, lambda stage, done: bar.update(task, description=stage, completed=done))
    if as_json:
        print_json({"name": name, "directory": str(directory)})
    else:
        print(directory)


@app.command("show", epilog="Example: `rayllm models show ./my-model`")
def show(
    model: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A Hugging Face directory or a fetched model; only config.json is read."),
    ],
    as_json: Json = False,
) -> None:
    """Show a model's shape, its parameters and the memory of its weights and of a token in the KV cache."""
    from rayllm.cli.model_config import read_config
    from rayllm.models.families import spec_from_config
    from rayllm.models.quantization import read_quantization

    config = read_config(model)
    spec, int8 = spec_from_config(config), read_quantization(config)
    facts: dict[str, object] = {
        "family": spec.family,
        "params": spec.num_params,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_size": spec.ffn_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "context": spec.max_position_embeddings,
        "sliding_window": next((window for window in spec.windows if window is not None), None),
        "tied_embeddings": spec.tie_word_embeddings,
        "quantization": None,
        "not_quantized": None,
    }
    if int8 is not None:
        schemes = ", ".join(sorted({stored.scheme for _, stored in int8.groups}))
        facts["quantization"] = f"int8 {schemes}" + ", outlier columns in 16 bits" * int8.has_outliers
        facts["not_quantized"] = ", ".join(int8.ignore) or None
    if as_json:
        kv = {dtype: spec.kv_bytes_per_token(size) for dtype, size in DTYPE_BYTES.items()}
        print_json({**facts, "kv_bytes_per_token": kv})
        return
    from rich.table import Table

    table = Table("", model)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
    for dtype, size in DTYPE_BYTES.items():
        weights, token = format_bytes(spec.num_params * size), f"{spec.kv_bytes_per_token(size):,} bytes"
        table.add_row(f"in {dtype}", f"weights {weights}, KV cache of a token {token}")
    print_table(table)
