"""`rayllm serve`: a model behind HTTP and gRPC, on Ray."""

import json
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayllm.cli.config_file import merge, read_config, serve_config
from rayllm.cli.console import note, print_json, stdout_kept_clean
from rayllm.cli.options import MODEL_HELP, EngineOptions, Json, expand

if TYPE_CHECKING:  # brings torch
    from rayllm.serve.local import LocalServer

EXAMPLES = """
Example: `rayllm serve smollm2-135m`

Example: `rayllm serve ./my-model --tp 2 --dtype bfloat16 --http-port 8080`
"""
QUESTION = "What is the capital of France?"


@expand
def serve(
    engine: EngineOptions,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="TOML file of settings; options on the command line win."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="What clients call the model (the last part of MODEL).")
    ] = None,
    http_port: Annotated[int | None, typer.Option("--http-port", help="OpenAI-compatible HTTP [8000].")] = None,
    grpc_port: Annotated[int | None, typer.Option("--grpc-port", help="gRPC [9000].")] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", help="Copies of the model, each with its ranks [1].")
    ] = None,
    min_replicas: Annotated[
        int | None,
        typer.Option("--min-replicas", help="With --max-replicas: not fewer, however idle; may be 0 [1].", min=0),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", help="As many copies as the load needs, up to this many.", min=1)
    ] = None,
    shard_recovery_timeout: Annotated[
        float | None,
        typer.Option(
            "--shard-recovery-timeout",
            help="When a rank is lost, how many seconds requests wait for it to be replaced before they fail [120].",
            min=0.0,
        ),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            "--drain-timeout",
            help="How many seconds a replica that is to end has for the requests that are running [30].",
            min=0.0,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a model over HTTP and gRPC until Ctrl-C, which lets running requests finish first.

    Starts Ray on this machine. When the model is ready, prints a line to try over HTTP and one over gRPC; with --json,
    an object with `model`, `http_url` and `grpc_address` instead.
    """
    given = engine.sections(model)
    given["parallel"]["shard_recovery_timeout_s"] = shard_recovery_timeout
    given["serve"] = {
        "model_name": model_name,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "num_replicas": replicas,
        "drain_timeout_s": drain_timeout,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
    }
    settings = serve_config(merge(read_config(config) if config is not None else {}, given))
    note(f"Starting {settings.served_model} ...")
    with stdout_kept_clean():
        from rayllm.serve.local import serve_local

        try:
            server = serve_local(settings)
        except SystemExit:  # how Ray, once it has started, takes SIGTERM
            raise KeyboardInterrupt from None
    # An orchestrator asks to stop by SIGTERM; it means the same as Ctrl-C. Only now, for Ray sets a handler of its own.
    # SIGINT too: a shell starts what it puts in the background with SIGINT ignored.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.default_int_handler)
    with server:
        if as_json:
            print_json({"model": server.model, "http_url": server.http_url, "grpc_address": server.grpc_address})
        else:
            print(_greeting(server), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            # A second signal would cut the shutdown short and leave processes behind; the drain has an end of its own.
            for signal_number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signal_number, signal.SIG_IGN)
            note(f"Stopping; running requests have {settings.drain_timeout_s:g} s to finish ...")


def _greeting(server: "LocalServer") -> str:
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 32,
        "temperature": 0,
    }
    curl = ["curl", f"{server.http_url}/v1/chat/completions", "-H", "content-type: application/json", "-d"]
    chat = [sys.argv[0], "chat", "--url", f"grpc://{server.grpc_address}", "--temperature", "0"]
    return (
        f"{server.model} is ready. Ctrl-C stops it. Try:\n\n"
        f"  {shlex.join([*curl, json.dumps(body)])}\n\n"
        f"  echo {shlex.quote(QUESTION)} | {shlex.join(chat)}\n"
    )
