"""A checkpoint is whole or not there, training goes on from it as if nothing had been, and everybody can load it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayllm.core.errors import CheckpointError
from rayllm.models.checkpoint import Checkpoint
from rayllm.train.config import CheckpointConfig, LayoutConfig
from rayllm.train.saved import Saved, SavedRun, TrainState
from tests import train_ranks
from tests.ranks import Ranks
from tests.tiny_models import save_tiny
from tests.train_ranks import Trained
from tests.unit.test_train_step import OPTIMIZER, VOCAB, check_same, micro_batches

STEPS = [micro_batches(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def train(ranks: Ranks, start: Path, run: Path, layout: LayoutConfig, saved_after: int = 0) -> list[Trained]:
    return ranks.run(
        layout.world, train_ranks.train_with_checkpoint, start, run, layout, OPTIMIZER, STEPS, saved_after, {}
    )


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("llama-mqa-tied", LayoutConfig()),
        ("qwen3-bias-tied", LayoutConfig(shard=2, tensor=2)),
        ("llama-mqa-tied", LayoutConfig(replicate=2, shard=2)),
        ("llama-mqa-tied", LayoutConfig(pipeline=2, tensor=2)),
        ("gpt2-tied", LayoutConfig(shard=4)),
        ("gpt2-tied", LayoutConfig(pipeline=2, shard=2)),
    ],
    ids=str,
)
def test_training_goes_on_bit_by_bit(ranks: Ranks, case: str, layout: LayoutConfig, tmp_path: Path) -> None:
    changes = {} if case.startswith("gpt2") else {"num_key_value_heads": 2}
    save_tiny(tmp_path / "start", case, vocab_size=VOCAB, **changes)
    through = train(ranks, tmp_path / "start", tmp_path / "run", layout, saved_after=2)
    resumed = train(ranks, tmp_path / "start", tmp_path / "run", layout)
    for one, other in zip(resumed, through, strict=True):
        assert one.reports == other.reports[2:]
        assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())


def test_four_ranks_go_on_as_two_and_as_one(ranks: Ranks, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start", "qwen3-bias-tied", vocab_size=VOCAB, num_key_value_heads=2)
    [alone] = train(ranks, tmp_path / "start", tmp_path / "alone", LayoutConfig())
    train(ranks, tmp_path / "start", tmp_path / "run", LayoutConfig(shard=2, tensor=2), saved_after=2)
    rest = Trained(alone.reports[2:], alone.weights)
    for layout in (LayoutConfig(shard=2), LayoutConfig(pipeline=2), LayoutConfig(tensor=2), LayoutConfig()):
        check_same(train(ranks, tmp_path / "start", tmp_path / "run", layout), rest)


@pytest.mark.parametrize("case", ["llama-mqa-tied", "gpt2-tied", "gpt2-untied", "qwen3-gqa"])
def test_everybody_loads_it(ranks: Ranks, case: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start", case, vocab_size=VOCAB)
    (tmp_path / "start" / "tokenizer.json").write_text("{}")
    [trained, *_] = train(ranks, tmp_path / "start", tmp_path / "run", LayoutConfig(shard=4), saved_after=4)
    saved = SavedRun(tmp_path / "run").latest()
    assert saved is not None
    saved.verify()
    assert saved.state == TrainState(step=4, loss=trained.reports[-1].loss, cursor={"sample": 4})
    assert (saved.directory / "tokenizer.json").read_text() == "{}"
    checkpoint = Checkpoint.open(saved.directory)
    for name, value in trained.weights.items():
        assert torch.equal(checkpoint.read(name, tuple(slice(0, size) for size in value.shape)), value)
    model, report = AutoModelForCausalLM.from_pretrained(saved.directory, output_loading_info=True)
    assert not any(report.values()), report
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding.detach(), trained.weights["embed_tokens.weight"])


def test_damage_is_named(ranks: Ranks, tmp_path: Path) -> None:
    save_tiny(tmp_path / "start", "llama-gqa", vocab_size=VOCAB)
    train(ranks, tmp_path / "start", tmp_path / "run", LayoutConfig(), saved_after=1)
    saved = SavedRun(tmp_path / "run").latest()
    assert saved is not None
    weights = saved.directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors: is not what was written"):
        saved.verify()
    with pytest.raises(AssertionError, match=r"CheckpointError: .*model.safetensors: is not what was written"):
        train(ranks, tmp_path / "start", tmp_path / "run", LayoutConfig(shard=2))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: is missing"):
        saved.verify()


def fill(run: SavedRun, step: int, loss: float, reward: float | None = None) -> Saved:
    run.begin(step)
    (run.staging(step) / "model.safetensors").write_bytes(os.urandom(1 << 20))
    return run.publish(TrainState(step=step, loss=loss, reward=reward, cursor={}))


def test_what_is_kept(tmp_path: Path) -> None:
    run = SavedRun(tmp_path)
    for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0], 1):
        fill(run, step, loss)
        run.prune(CheckpointConfig(keep_last=2, keep_best=1))
    assert [one.state.step for one in run.all()] == [2, 4, 5]
    assert sorted(path.name for path in run.directory.iterdir()) == [f"step-{step:08d}" for step in (2, 4, 5)]


def test_of_rewards_the_highest_is_the_best(tmp_path: Path) -> None:
    run = SavedRun(tmp_path)
    for step, (loss, reward) in enumerate([(1.0, 0.1), (3.0, 0.9), (2.0, 0.5)], 1):
        fill(run, step, loss, reward)
        run.prune(CheckpointConfig(keep_last=1, keep_best=1))
    assert [one.state.step for one in run.all()] == [2, 3]


def test_a_killed_save_leaves_the_others_whole(tmp_path: Path) -> None:
    script = (
        "import os; from pathlib import Path\n"
        "from rayllm.train.config import CheckpointConfig\n"
        "from rayllm.train.saved import SavedRun, TrainState\n"
        f"run = SavedRun(Path({str(tmp_path)!r}))\n"
        "step = run.latest().state.step if run.latest() else 0\n"
        "while True:\n"
        "    step += 1\n"
        "    run.begin(step)\n"
        "    (run.staging(step) / 'model.safetensors').write_bytes(os.urandom(1 << 20))\n"
        "    run.publish(TrainState(step=step, loss=1.0, cursor={}))\n"
        "    run.prune(CheckpointConfig(keep_last=3))\n"
        "    print(step, flush=True)\n"
    )
    done = 0
    for round_ in range(10):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        done = int(process.stdout.readline())
        time.sleep(0.003 * round_)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        done = int(rest[-1]) if rest else done
        saved = SavedRun(tmp_path).all()
        assert saved[-1].state.step >= done
        for one in saved:
            one.verify()
