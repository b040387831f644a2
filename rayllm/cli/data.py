"""`rayllm data`: training sets made ready and looked at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rayllm.cli.console import note, print_json, print_table, progress, stdout_kept_clean
from rayllm.cli.options import Json

if TYPE_CHECKING:
    from rayllm.train.data.info import DatasetInfo
    from rayllm.train.data.pack import PackSettings

PACK_EXAMPLES = """
Example: `rayllm data pack corpus/*.parquet --output packed --tokenizer smollm2-135m --sequence-length 2048`

Example: `rayllm data pack chats.jsonl --kind chat --output packed --tokenizer ./my-model --sequence-length 1024`

Example: `rayllm data pack pairs.jsonl --kind preference --output pairs --tokenizer ./my-model --sequence-length 512`

Example: `rayllm data pack questions.jsonl --kind prompt --output prompts --tokenizer ./my-model --sequence-length 256`
"""

_COUNTS = (
    "num_rows",
    "num_documents",
    "num_pieces",
    "num_left_out",
    "num_tokens",
    "num_targets",
    "num_empty",
    "num_dropped",
)

app = typer.Typer(
    no_args_is_help=True,
    help="Make training sets ready, and look at what a model will see.",
    epilog="Example: `rayllm data pack corpus.jsonl --output packed --tokenizer smollm2-135m --sequence-length 512`",
)


@app.command("pack", epilog=PACK_EXAMPLES)
def pack(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="Parquet, .jsonl and .txt files, or folders of them, in this order."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The directory to make; it must not be there yet.")
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer", "--model", metavar="MODEL", help="Whose tokenizer and chat template: a directory or a model."
        ),
    ],
    sequence_length: Annotated[
        int,
        typer.Option(
            "--sequence-length", "-n", metavar="N", help="Tokens in a row; of a pair or a prompt: at most.", min=2
        ),
    ],
    kind: Annotated[
        Literal["text", "chat", "preference", "prompt"],
        typer.Option(
            "--kind",
            help="What a row holds. text: a column `text`, or a whole .txt file; chat: `messages` with role and"
            " content; preference: `prompt`, `chosen` and `rejected`, texts or messages; prompt: `prompt` alone.",
        ),
    ] = "text",
    drop_long: Annotated[
        bool,
        typer.Option("--drop-long", help="Leave out pairs and prompts longer than N, which are an error otherwise."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Tokenize and pack a training set, on all cores or on the Ray cluster at RAY_ADDRESS.

    Every row is checked before the work begins. Texts fill rows to the last token and go on in the next row;
    conversations are put together so that none is cut which fits, and only the assistant's turns are learnt. Documents
    in a row do not see each other. DIR is complete or not there; dataset.json in it says what it was made of.
    """
    from rayllm.train.data.pack import PackSettings
    from rayllm.train.data.rows import Kind

    settings = PackSettings(kind=Kind(kind), sequence_length=sequence_length, drop_long=drop_long)
    with stdout_kept_clean():
        info = _pack(inputs, output, tokenizer, settings)
    facts = _facts(info, output)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _pack(inputs: list[Path], output: Path, tokenizer: str, settings: "PackSettings") -> "DatasetInfo":
    from rayllm.models.hub import resolve_model
    from rayllm.train.data.pack import pack, prepare

    # a tokenizer alone is enough: a model may be yet to be made
    directory = Path(tokenizer) if Path(tokenizer).is_dir() else resolve_model(tokenizer)
    prepared = prepare(inputs, output, directory, settings)
    note(f"checked: {prepared.num_rows} rows, {len(prepared.sources)} files")
    with progress("packing", prepared.num_rows) as advance:
        return pack(prepared, on_rows=advance)


def _facts(info: "DatasetInfo", output: Path) -> dict[str, Any]:
    from rayllm.train.data.shards import UNCUT_SCHEMAS

    slots = info.num_rows * info.sequence_length
    facts: dict[str, Any] = {"directory": str(output), "kind": info.kind.value, "sequence_length": info.sequence_length}
    for name in _COUNTS:
        facts[name] = getattr(info, name)
    if info.kind not in UNCUT_SCHEMAS:
        facts["padding"] = info.num_padding / slots
    return {**facts, "files": len(info.files), "fingerprint": info.fingerprint}


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("", facts.pop("directory"))
    names = {
        "num_left_out": "pieces left out, in which nothing is learnt",
        "num_targets": "tokens that are learnt",
        "padding": "share of padding",
    }
    for name, value in facts.items():
        shown = f"{value:.2%}" if isinstance(value, float) else str(value)
        table.add_row(names.get(name, name.removeprefix("num_").replace("_", " ")), shown)
    print_table(table)
