"""A run on Ray Train: it learns, what it saves is served, and a worker that is killed costs at most an interval."""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rayllm.core.config import CacheConfig
from rayllm.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.train.config_file import read_train_config
from rayllm.train.data.rows import Kind
from rayllm.train.launch import launch
from rayllm.train.progress import Progress, read_metrics, read_progress
from rayllm.train.samples import read_samples
from rayllm.train.saved import SavedRun
from rayllm_cluster.session import Session
from tests.html_page import parse
from tests.packed_rows import pack_rows

pytestmark = pytest.mark.ray

LENGTH = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    rows = [{"text": f"the cat {n % 7} sat on the mat and the dog {n % 3} sat. " * 4} for n in range(200)]
    return pack_rows(tmp_path_factory.mktemp("data"), tiny_model, Kind.TEXT, rows, LENGTH)


@pytest.fixture
def file(tmp_path: Path, tiny_model: Path, data: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(
        f"""
run = "{tmp_path / "run"}"
[model]
start = "{tiny_model}"
random = true
[data]
path = "{data}"
[batch]
sequence_length = {LENGTH}
tokens = {4 * LENGTH}
[optimizer]
learning_rate = 1e-2
[schedule]
steps = 20
warmup_steps = 2
[checkpoint]
every_steps = 5
"""
    )
    return path


def test_what_is_wrong_is_said_before_workers_start(file: Path, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide the model's"):
        launch(read_train_config(file, ["layout.tensor=7", "run=x"]), "pretrain")
    with pytest.raises(ConfigError, match=r"batch.sequence_length: 16, but .* packed in rows of 32 tokens"):
        launch(read_train_config(file, ["batch.sequence_length=16"]), "pretrain")
    with pytest.raises(DataError, match="holds text rows; sft reads chat"):
        launch(read_train_config(file), "sft")
    with pytest.raises(DataError):
        launch(read_train_config(file, [f"data.path={tmp_path}"]), "pretrain")


def test_a_run_learns_and_is_served(session: Session, file: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    launch(read_train_config(file, ["layout.replicate=2"]), "pretrain", on_progress=told.append)
    metrics = read_metrics(tmp_path / "run")
    assert [row.step for row in metrics] == list(range(1, 21))
    assert metrics[-1].loss < 0.6 * metrics[0].loss
    assert told[-1] == metrics[-1]
    saved = SavedRun(tmp_path / "run").all()
    assert [one.state.step for one in saved] == [15, 20]
    saved[-1].verify()
    with LLM(str(saved[-1].directory), cache=CacheConfig(cpu_memory_bytes=64 << 20)) as llm:
        [answer] = llm.generate(["the cat"])
    assert answer.outputs[0].token_ids


def test_tuning_learns_the_answers_and_no_more(session: Session, file: Path, tmp_path: Path, tiny_model: Path) -> None:
    """In stages whose weights are sharded, in bfloat16. The questions are noise, which nothing could learn."""
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"{n * 7919 % 1000}"},
                {"role": "assistant", "content": "the cat"},
            ]
        }
        for n in range(60)
    ]
    chats = pack_rows(tmp_path / "chat", tiny_model, Kind.CHAT, turns, LENGTH)
    layout = ["layout.pipeline=2", "layout.shard=2", "model.compute_dtype=bfloat16", "model.save_dtype=bfloat16"]
    asked = ['samples.prompts=["17"]', "samples.chat=true", "samples.max_tokens=20"]
    launch(read_train_config(file, [f"data.path={chats}", "model.random=false", *layout, *asked]), "sft")
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1].loss < 0.2 < metrics[0].loss
    saved = SavedRun(tmp_path / "run").latest()
    assert saved is not None
    with LLM(str(saved.directory), cache=CacheConfig(cpu_memory_bytes=64 << 20)) as llm:
        answer = llm.chat([{"role": "user", "content": "17"}], SamplingParams(temperature=0, max_tokens=20))
    assert answer.outputs[0].text == "the cat"
    assert answer.outputs[0].finish_reason == "stop"
    samples = read_samples(tmp_path / "run")
    assert samples is not None
    [sample] = samples.samples
    assert sample.after == "the cat" != sample.before


def test_a_killed_worker_costs_at_most_an_interval(session: Session, file: Path, tmp_path: Path) -> None:
    config = read_train_config(file, ["layout.shard=2", "schedule.steps=80", "checkpoint.every_steps=20"])
    killed = threading.Event()
    steps: list[int] = []

    def kill_once(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step >= 30 and not killed.is_set():
            killed.set()
            os.kill(progress.pid, signal.SIGKILL)

    launch(config, "pretrain", on_progress=kill_once)
    assert killed.is_set()
    assert steps[-1] == 80
    assert [row.step for row in read_metrics(tmp_path / "run")] == list(range(1, 81))
    whole = read_train_config(file, ["layout.shard=2", "schedule.steps=80", f"run={tmp_path / 'whole'}"])
    launch(whole, "pretrain")
    losses, expected = ([row.loss for row in read_metrics(tmp_path / name)] for name in ("run", "whole"))
    assert losses == expected


def test_a_run_that_fails_says_why(
    session: Session, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TrainingError, match=r"the run failed: .*training has diverged"):
        launch(read_train_config(file, ["optimizer.learning_rate=1e30"]), "pretrain")
    assert "going on" not in caplog.text, "it would diverge again"
    told = read_progress(tmp_path / "run")
    assert told is not None
    assert read_metrics(tmp_path / "run")[-1] == told, "the steps before it diverged are kept"


def test_mlflow_hears_of_a_run_and_how_it_ended(
    session: Session, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = ["schedule.steps=5", "restarts=0", f"mlflow.tracking_uri={tmp_path / 'store'}"]
    launch(read_train_config(file, settings), "pretrain")
    with pytest.raises(TrainingError):
        launch(
            read_train_config(file, [*settings, f"run={tmp_path / 'wild'}", "optimizer.learning_rate=1e30"]), "pretrain"
        )
    client = mlflow.MlflowClient(str(tmp_path / "store"))
    runs = {run.info.run_name: run for run in client.search_runs(["0"])}
    assert {name: run.info.status for name, run in runs.items()} == {"run": "FINISHED", "wild": "FAILED"}
    for name, run in runs.items():
        told = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
        assert told == {row.step: row.loss for row in read_metrics(tmp_path / name)}
        assert told
    with pytest.raises(ConfigError, match=r"mlflow.tracking_uri: nowhere://x cannot be used"):
        launch(read_train_config(file, ["mlflow.tracking_uri=nowhere://x"]), "pretrain")


def test_command_line(file: Path, data: Path, tmp_path: Path) -> None:
    """With paths from where it is started."""
    command = [sys.executable, "-m", "rayllm", "train", "pretrain", "--config", file.name, "--json"]
    changes = ["schedule.steps=3", "run=run", f"data.path={os.path.relpath(data, tmp_path)}"]
    command += [f"--set={change}" for change in changes]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["checkpoint"] == "run/checkpoints/step-00000003"
    SavedRun(tmp_path / "run").all()[-1].verify()
    assert answer["step"] == 3
    assert re.search(r"step 3/3  loss .* tokens/s  \d+% of matmul rate .*  left 0:00:00", result.stderr)
    last = read_metrics(tmp_path / "run")[-1]
    assert last.mfu is None
    assert last.matmul_share is not None
    assert 0 < last.matmul_share < 1
    assert last.flops_per_second > 0
    report = [sys.executable, "-m", "rayllm", "train", "report", str(tmp_path / "run")]
    result = subprocess.run(report, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    page = parse((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "3 of 3" in page.text
    assert f"{read_metrics(tmp_path / 'run')[-1].loss:.4g}" in page.text


def cat_and_dog(folder: Path, tokenizer: Path) -> list[str]:
    """Settings to learn to answer with one word and not with another, whatever the question."""
    rows = [{"prompt": f"{n * 7919 % 1000}", "chosen": " cat", "rejected": " dog"} for n in range(24)]
    pairs = pack_rows(folder / "pairs", tokenizer, Kind.PREFERENCE, rows, LENGTH)
    return [
        *(f"data.path={pairs}", "model.random=false", f"batch.tokens={8 * LENGTH}", "batch.rows=2"),
        *("layout.shard=2", "optimizer.learning_rate=1e-3", "schedule.kind=constant"),
    ]


def test_ctrl_c_ends_a_run_that_goes_on_when_it_is_started_again(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rayllm", "train", "pretrain", "--config", str(file)]
    # A shell starts what it puts in the background with SIGINT ignored
    running = subprocess.Popen(
        [*command, "--set=schedule.steps=1000000"],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        saved = SavedRun(tmp_path / "run")
        while saved.latest() is None:
            assert running.poll() is None, running.communicate()
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
        assert running.returncode == 130
    finally:
        running.kill()
    done = saved.latest()
    assert done is not None
    done.verify()
    one_more = f"--set=schedule.steps={done.state.step + 1}"
    again = subprocess.run([*command, one_more], capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert saved.latest().state.step == done.state.step + 1


def test_preferences_are_learnt_from_the_command_line_and_served(file: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Half of the run after a new start."""
    changes = [*cat_and_dog(tmp_path, tiny_model), "dpo.beta=0.2"]
    command = [sys.executable, "-m", "rayllm", "train", "dpo", "--config", str(file), "--json"]
    for steps in (6, 12):
        settings_of_run = [f"--set={one}" for one in (*changes, f"schedule.steps={steps}")]
        result = subprocess.run([*command, *settings_of_run], capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        assert f"step {steps}/{steps}  loss" in result.stderr
        assert "margin" in result.stderr
        assert "accuracy" in result.stderr
    metrics = read_metrics(tmp_path / "run")
    assert [row.step for row in metrics] == list(range(1, 13))
    assert metrics[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1].measures["accuracy"] == 1
    assert metrics[-1].measures["margin"] > 1
    assert metrics[-1].loss < 0.2
    assert len(list((tmp_path / "run" / "reference").iterdir())) == 1
    saved = SavedRun(tmp_path / "run").latest()
    assert saved is not None
    gaps = [_preference(saved.directory), _preference(tiny_model)]
    assert gaps[0] - gaps[1] > 5  # margin / beta


def test_rewards_are_learnt_from_the_command_line(file: Path, tmp_path: Path, tiny_model: Path) -> None:
    settings = [f"--set={one}" for one in (*cat_and_dog(tmp_path, tiny_model), "schedule.steps=12")]
    command = [sys.executable, "-m", "rayllm", "train", "rm", "--config", str(file), "--json", *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "step 12/12  loss" in result.stderr
    assert read_metrics(tmp_path / "run")[-1].measures["accuracy"] == 1
    saved = json.loads(result.stdout)["checkpoint"]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(saved), Tokenizer.load(tiny_model)
    end = min(tokenizer.eos_token_ids)
    cat, dog = (model(torch.tensor([[*tokenizer.encode(f"12345{word}"), end]])).logits for word in (" cat", " dog"))
    assert cat.item() > dog.item()
    with pytest.raises(CheckpointError, match="is a reward model"):
        LLM(saved)


def test_a_policy_is_trained_from_the_command_line(file: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Rewards for one word and against another, learnt from pairs, teach the policy to say it."""
    learnt = [f"--set={one}" for one in (*cat_and_dog(tmp_path, tiny_model), "schedule.steps=12")]
    command = [sys.executable, "-m", "rayllm", "train", "rm", "--config", str(file), "--json", *learnt]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    rows = [{"prompt": f"{n * 7919 % 1000}"} for n in range(24)]
    prompts = pack_rows(tmp_path / "prompts", tiny_model, Kind.PROMPT, rows, 8)
    settings = [
        *(f"run={tmp_path / 'ppo'}", f"data.path={prompts}", "model.random=false", "layout.shard=2"),
        *("batch.sequence_length=16", f"batch.tokens={32 * 16}", "batch.rows=8", "schedule.kind=constant"),
        *("schedule.steps=60", "checkpoint.every_steps=0", "optimizer.learning_rate=2e-3"),
        *("ppo.answer_tokens=4", "ppo.minibatches=1", "ppo.epochs=4", "ppo.kl_coef=0.01"),
        f"ppo.reward_model={json.loads(result.stdout)['checkpoint']}",
    ]
    command = [sys.executable, "-m", "rayllm", "train", "ppo", "--config", str(file), "--json"]
    result = subprocess.run(
        [*command, *(f"--set={one}" for one in settings)], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "step 60/60  loss" in result.stderr
    metrics = read_metrics(tmp_path / "ppo")
    assert metrics[0].measures["kl"] == 0
    rewards = [row.measures["reward"] for row in metrics[::4]]
    assert statistics.mean(rewards[-3:]) > statistics.mean(rewards[:3]) + 0.5
    assert max(row.measures["gap_max_abs_diff"] for row in metrics) < 1e-4
    with LLM(json.loads(result.stdout)["checkpoint"], cache=CacheConfig(cpu_memory_bytes=64 << 20)) as llm:
        [answer] = llm.generate(["17"])
    assert answer.outputs[0].token_ids


def _preference(model: Path) -> float:
    """By how many nats the engine prefers the one answer to the other, after a question that nobody trained on."""
    question = "12345"
    with LLM(str(model), dtype="float32", cache=CacheConfig(cpu_memory_bytes=64 << 20)) as llm:
        first = len(llm.tokenizer.encode(question))
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=first)
        outputs = llm.generate([f"{question} cat", f"{question} dog"], params)
    cat, dog = (
        math.fsum(token.logprob for token in (output.prompt_logprobs or [])[first:] if token is not None)
        for output in outputs
    )
    return cat - dog
