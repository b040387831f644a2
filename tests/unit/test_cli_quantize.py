"""`rayllm quantize` as its users meet it: a directory that serves, a report, or one line and nothing at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayllm.cli.main import main
from rayllm.core.config import CacheConfig
from rayllm.core.errors import ConfigError
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from tests.checkpoints import sealed

CACHE = CacheConfig(num_blocks=32)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["rayllm", "quantize", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        output = capsys.readouterr()
        return Result(int(exit_.value.code or 0), output.out, output.err)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text("The quick brown fox. 빠른 갈색 여우. " * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize(("scheme", "outliers"), [("w8a16", "none"), ("w8a8", "smooth"), ("w8a8", "mixed")])
def test_the_directory_serves(
    quantize: Callable[..., Result], tiny_model: Path, text: Path, tmp_path: Path, scheme: str, outliers: str
) -> None:
    out = tmp_path / "out"
    result = quantize(
        tiny_model,
        out,
        "--scheme",
        scheme,
        "--outliers",
        outliers,
        "--calibration",
        text,
        "--skip",
        "lm_head",
        "--json",
    )
    assert result.status == 0, result.err
    report = json.loads(result.out)
    linear_weights = 3 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80)
    saved = report["bytes_before"] - report["bytes_after"]
    assert 0.85 * 3 * linear_weights < saved < 3 * linear_weights  # float32 to int8, less scales and names
    assert (report["scheme"], report["outliers"], report["skip"]) == (scheme, outliers, ["lm_head"])
    assert 0 < report["mean_error"] <= report["worst_error"] < 0.03
    assert len(report["layers"]) == 3 * 7
    assert report["calibration_tokens"] > 100
    assert json.loads((out / "quantization_report.json").read_text()).items() <= report.items()
    assert (out / "weight_ranges.png").read_bytes().startswith(b"\x89PNG")
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())
    with LLM(str(out), cache=CACHE) as llm:
        [answer] = llm.generate("The quick", GREEDY)
        assert len(answer.outputs[0].token_ids) == 8


def test_at_load_by_argument(tiny_model: Path, tmp_path: Path, quantize: Callable[..., Result]) -> None:
    assert quantize(tiny_model, tmp_path / "out", "--scheme", "w8a8").status == 0
    with (
        LLM(str(tiny_model), quantize="w8a8", cache=CACHE) as at_load,
        LLM(str(tmp_path / "out"), cache=CACHE) as stored,
    ):
        answers = [llm.generate("The quick brown", GREEDY)[0].outputs[0].token_ids for llm in (at_load, stored)]
    assert answers[0] == answers[1]
    with pytest.raises(ConfigError, match="is an int8 checkpoint already; leave the option out"):
        LLM(str(tmp_path / "out"), quantize="w8a8", cache=CACHE)


def test_a_person_gets_a_table(quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    result = quantize(tiny_model, tmp_path / "out", "--outliers", "clip")
    assert result.status == 0
    for words in ("weights", "layers in int8", "22", "mean error of weights"):
        assert words in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "w8a8", "--outliers", "smooth"], "outliers: smooth needs --calibration FILE"),
        (["--scheme", "w8a16", "--outliers", "mixed"], "outliers: mixed is about int8 activations: w8a16 has none"),
        (["--skip", "head"], "skip: 'head' is no linear layer of this model; near it are lm_head, "),
        (["--skip", "model.layers.3.mlp.down_proj"], "near it are model.layers.2.mlp.down_proj, "),
        (["--skip", "*"], "skip: leaves no layer to quantize"),
        (["--calibration", "/nowhere.txt"], "calibration: /nowhere.txt: No such file or directory"),
    ],
)
def test_refused_with_nothing_written(
    quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = quantize(tiny_model, tmp_path / "out", *arguments)
    assert (result.status, result.out) == (1, "")
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_layers_are_skipped_by_any_of_their_names(
    quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    names = ["model.layers.0.mlp.down_proj", "layers.1.mlp.up_proj", "lm_head", "k_proj"]
    skip = [word for name in names for word in ("--skip", name)]
    assert quantize(tiny_model, tmp_path / "out", "--scheme", "w8a8", *skip).status == 0
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    skipped = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head"}
    assert set(ignored) == skipped | {f"model.layers.{i}.self_attn.k_proj" for i in range(3)}
    again = [word for name in ignored for word in ("--skip", name)]
    assert quantize(tiny_model, tmp_path / "again", "--scheme", "w8a8", *again).status == 0
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_too_short_a_calibration(quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one line of text", encoding="utf-8")
    result = quantize(tiny_model, tmp_path / "out", "--calibration", tmp_path / "short.txt")
    assert result.status == 1
    assert "short.txt: is a text of 16 tokens; at least 512 are needed" in result.err
    assert not (tmp_path / "out").exists()


def test_weights_in_other_forms_are_neither_counted_nor_copied(
    quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    plain = json.loads(quantize(tiny_model, tmp_path / "plain", "--json").out)
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("consolidated.safetensors", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json"):
        (tmp_path / "model" / name).write_bytes(b"\0" * 100_000)
    report = json.loads(quantize(tmp_path / "model", tmp_path / "out", "--json").out)
    assert report["bytes_before"] == plain["bytes_before"] == (tiny_model / "model.safetensors").stat().st_size
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "plain").iterdir()
    }


def test_a_directory_that_is_there_is_left_alone(
    quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    result = quantize(tiny_model, tmp_path / "out")
    assert result.status == 1
    assert "is there already" in result.err
    assert list((tmp_path / "out").iterdir()) == []


def test_the_default_follows_the_calibration(
    quantize: Callable[..., Result], tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    without = json.loads(quantize(tiny_model, tmp_path / "without", "--json").out)
    with_text = json.loads(quantize(tiny_model, tmp_path / "with", "--calibration", text, "--json").out)
    chosen = json.loads(
        quantize(tiny_model, tmp_path / "chosen", "--calibration", text, "--outliers", "none", "--json").out
    )
    assert [report["outliers"] for report in (without, with_text, chosen)] == ["none", "smooth", "none"]
    assert with_text["error_of"] == chosen["error_of"] == "outputs"


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"],
)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_broken_weight_leaves_nothing_behind(
    quantize: Callable[..., Result],
    make_tiny_model: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    name: str,
    bad: float,
    calibrated: bool,
) -> None:
    """Nor directories above OUT that were not there; and the weight is blamed, not the text."""
    model = make_tiny_model()
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[5] = bad
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    result = quantize(model, tmp_path / "there" / "new" / "out", *(["--calibration", text] if calibrated else []))
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines()[-1] == f"error: {model}: tensor {name} holds NaN or infinity"
    assert list((tmp_path / "there").iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "there"]


def test_a_calibration_text_that_cannot_be_a_prompt_is_named(
    quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("a\0b" * 1000)
    result = quantize(tiny_model, tmp_path / "out", "--calibration", text)
    assert result.status == 1
    assert result.err.splitlines()[-1] == f"error: calibration: {text}: holds a NUL character at position 1"


@pytest.mark.parametrize(
    ("out", "reason"),
    [("{file}/out", "Not a directory"), ("{file}/a/out", "Not a directory"), ("/proc/out", "No such file")],
)
def test_a_place_that_cannot_be_made_is_one_line(
    quantize: Callable[..., Result], tiny_model: Path, text: Path, tmp_path: Path, out: str, reason: str
) -> None:
    """Said before the work."""
    place = Path(out.format(file=text))
    result = quantize(tiny_model, place, "--calibration", text)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: {place}: cannot be made: ")
    assert reason in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [text]


def test_what_is_true_of_the_weights_before_is_not_copied(
    quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    """A checkpoint of a run has a manifest and a state; int8 weights are not those that they speak of."""
    source = sealed(Path(shutil.copytree(tiny_model, tmp_path / "step-00000001")))
    (source / "state.json").write_text('{"step": 1}')
    assert quantize(source, tmp_path / "out").status == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"manifest.json", "state.json"}
    assert {"tokenizer.json", "generation_config.json"} <= names


def test_a_full_disk_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """As a limit on the size of files has it, which the weights alone exceed."""
    command = f"ulimit -f 50; exec {sys.executable} -m rayllm quantize {tiny_model} {tmp_path / 'new' / 'out'}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"error: {tmp_path / 'new' / 'out'}: cannot be written: File too large"
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_terminated_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"  # a pipe that nobody writes to: the command waits there, its directory half made
    os.mkfifo(endless)
    parent = tmp_path / "parent"
    parent.mkdir()
    command = [sys.executable, "-m", "rayllm", "quantize", tiny_model, parent / "out", "--calibration", endless]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(parent.iterdir()):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.kill()
    assert not list(parent.iterdir())


def test_a_dangling_link_is_left_alone(quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    result = quantize(tiny_model, tmp_path / "out")
    assert result.status == 1
    assert "is there already" in result.err
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_int8_model_is_not_quantized_again(
    quantize: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    assert quantize(tiny_model, tmp_path / "out").status == 0
    result = quantize(tmp_path / "out", tmp_path / "again")
    assert result.status == 1
    assert "is an int8 checkpoint already" in result.err
