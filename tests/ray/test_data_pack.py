"""Packing by Ray Data equals packing in one process, and its errors are as clear."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from rayllm.cli.main import main
from rayllm.core.errors import DataError
from rayllm.train.data import sources
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.pack import PackSettings, pack, prepare
from rayllm.train.data.rows import Kind
from rayllm.train.data.tokenize import tokenize_chunk
from rayllm_cluster.session import Session
from tests.ray.processes import descendants, wait_gone

pytestmark = pytest.mark.ray


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_equals_one_process(session: Session, tmp_path: Path, tiny_model: Path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 2000)
    file = write(tmp_path / "a.jsonl", [{"text": f"the cat {n} and " * (n % 9)} for n in range(400)])
    settings = PackSettings(kind=Kind.TEXT, sequence_length=64)
    here = pack(
        prepare([file], tmp_path / "here", tiny_model, settings),
        tokenize=lambda chunks, *rest: ((c, table) for c in chunks for table in tokenize_chunk(c, *rest)),
    )
    prepared = prepare([file], tmp_path / "ray", tiny_model, settings)
    assert len(prepared.sources[0].chunks) > 8
    done = []
    there = pack(prepared, on_rows=done.append)
    assert there == here
    assert sum(done) == 400
    assert (
        PackedDataset(tmp_path / "ray").row(5).tokens.tolist()
        == PackedDataset(tmp_path / "here").row(5).tokens.tolist()
    )
    assert ray.is_initialized(), "the session that was there goes on"


def test_a_problem_in_a_worker_is_the_drivers_error(session: Session, tmp_path: Path, make_tiny_model, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 500)
    model = make_tiny_model()
    config = model / "chat_template.jinja"
    config.write_text(
        "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + config.read_text()
    )
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the"}]
    rows = [{"messages": turns * (2 if n in (17, 33) else 1)} for n in range(40)]
    file = write(tmp_path / "a.jsonl", rows)
    prepared = prepare([file], tmp_path / "out", model, PackSettings(kind=Kind.CHAT, sequence_length=32))
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 18: messages: the model's chat template refuses them: too many"
    ):
        pack(prepared)
    assert not (tmp_path / "out").exists()


def test_bad_data_is_refused_before_ray_is_asked(tmp_path: Path, tiny_model: Path):
    file = write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": 3}])
    with pytest.raises(DataError, match="line 2: text: is of type int"):
        prepare([file], tmp_path / "out", tiny_model, PackSettings(kind=Kind.TEXT, sequence_length=32))


def test_from_the_command_line(session: Session, tmp_path: Path, tiny_model: Path, monkeypatch, capsys):
    """Relative paths: workers have a folder of their own."""
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), [{"text": f"the cat {n}"} for n in range(20)])
    command = ["data", "pack", "a.jsonl", "--output", "out", "--tokenizer", str(tiny_model), "--sequence-length", "32"]
    monkeypatch.setattr(sys, "argv", ["rayllm", *command, "--json"])
    with pytest.raises(SystemExit) as exit_:
        main()
    output = capsys.readouterr()
    assert not exit_.value.code, output.err
    facts = json.loads(output.out)
    dataset = PackedDataset(tmp_path / "out")
    assert facts["num_documents"] == 20
    assert facts["fingerprint"] == dataset.info.fingerprint
    held = sum(sum(dataset.row(sample).document_lengths) for sample in range(len(dataset)))
    assert facts["padding"] == pytest.approx(1 - held / (32 * len(dataset)))
    assert output.err == "checked: 20 rows, 1 files\n"


def tokenizes(pid: int) -> bool:
    try:
        return "ray::MapBatches" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended meanwhile
        return False


def test_terminated_leaves_nothing_behind(tmp_path: Path, tiny_model: Path):
    """While Ray works: neither the directory half made, nor the one above it, nor a process."""
    texts = write(tmp_path / "a.jsonl", [{"text": "the quick brown fox " * 200}] * 40_000)
    command = [sys.executable, "-m", "rayllm", "data", "pack", texts, "--output", tmp_path / "new" / "packed"]
    options = ["--tokenizer", tiny_model, "--sequence-length", "512"]
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen([*command, *options], env=alone, stderr=subprocess.PIPE, text=True)
    started: set[int] = set()
    while not any(map(tokenizes, descendants(process.pid))):
        assert process.poll() is None
        started |= descendants(process.pid)
        time.sleep(0.01)
    assert len(list((tmp_path / "new").iterdir())) == 1
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        started |= descendants(process.pid)
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [texts]
    assert wait_gone(started, 10) == set()
