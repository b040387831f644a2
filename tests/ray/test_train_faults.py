"""What training survives: a node that is lost, the end of everything, a rank that stalls. And two nodes are as one."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from rayllm.core.errors import TrainingError
from rayllm.train import launch as launch_module
from rayllm.train.config import TrainConfig
from rayllm.train.config_file import read_train_config
from rayllm.train.data.rows import Kind
from rayllm.train.launch import launch
from rayllm.train.progress import Progress, read_metrics, read_progress
from rayllm.train.saved import SavedRun
from rayllm_cluster.session import Session
from tests.packed_rows import pack_rows, seven_pairs
from tests.ray.processes import descendants, wait_gone

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LENGTH = 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    rows = [{"text": f"the cat {n % 7} sat on the mat and the dog {n % 3} sat. " * 4} for n in range(200)]
    return pack_rows(tmp_path_factory.mktemp("data"), tiny_model, Kind.TEXT, rows, LENGTH)


@pytest.fixture
def file(tmp_path: Path, tiny_model: Path, texts: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(
        f"""
run = "{tmp_path / "run"}"
[model]
start = "{tiny_model}"
[data]
path = "{texts}"
[batch]
sequence_length = {LENGTH}
tokens = {4 * LENGTH}
[optimizer]
learning_rate = 1e-3
[schedule]
steps = 60
warmup_steps = 2
[checkpoint]
every_steps = 10
[layout]
shard = 2
"""
    )
    return path


@contextmanager
def cluster_of(*cpus: int) -> Iterator[Cluster]:
    """A head that computes nothing, and a node for each number of CPUs."""
    before = descendants(os.getpid())
    size = {"object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
    try:
        for number in cpus:
            cluster.add_node(num_cpus=number, **size)
        with Session.start(address=cluster.address):
            yield cluster
    finally:
        cluster.shutdown()
        assert wait_gone(descendants(os.getpid()) - before, 20) == set()


@pytest.mark.parametrize("recipe", ["pretrain", "dpo"])
def test_two_nodes_are_as_one(recipe: str, file: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Two workers of a CPU each, and each node has but one."""
    settings = ["schedule.steps=12", "checkpoint.every_steps=0"]
    if recipe == "dpo":
        settings.append(f"data.path={seven_pairs(tmp_path / 'pairs', tiny_model, LENGTH)}")
    with Session.start(num_cpus=3):
        launch(read_train_config(file, [*settings, f"run={tmp_path / 'one'}"]), recipe)
    with cluster_of(1, 1):
        launch(read_train_config(file, [*settings, f"run={tmp_path / 'two'}"]), recipe)
    one, two = (
        [(row.loss, row.grad_norm, row.measures) for row in read_metrics(tmp_path / run)] for run in ("one", "two")
    )
    assert len(one) == 12
    assert one == two


def test_a_lost_node_costs_at_most_an_interval(file: Path, tmp_path: Path) -> None:
    lost_at: list[int] = []
    steps: list[int] = []
    with cluster_of(1, 1, 1) as cluster:

        def lose(progress: Progress) -> None:
            steps.append(progress.step)
            if progress.step >= 25 and not lost_at:
                lost_at.append(progress.step)
                [node] = [node for node in cluster.worker_nodes if progress.pid in below(node)]
                cluster.remove_node(node, allow_graceful=False)

        launch(read_train_config(file), "pretrain", on_progress=lose)
    assert lost_at
    again = steps[steps.index(lost_at[0]) + 1 :]
    assert again[0] > lost_at[0] - 10 - 5, "more than an interval was computed anew"
    with Session.start(num_cpus=3):
        launch(read_train_config(file, [f"run={tmp_path / 'whole'}"]), "pretrain")
    losses, expected = ([row.loss for row in read_metrics(tmp_path / run)] for run in ("run", "whole"))
    assert len(losses) == 60
    assert losses == expected


def test_a_run_has_as_many_groups_as_there_is_room_for(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that may be three, until a node is lost; every sample is learnt from once. A lost node may be taken for room
    until Ray has missed it."""
    sizes: list[int] = []
    real = launch_module._fit

    def recorded(config: TrainConfig, recipe: str) -> None:
        sizes.append(config.layout.replicate)
        real(config, recipe)

    monkeypatch.setattr(launch_module, "_fit", recorded)
    settings = [f"batch.tokens={6 * LENGTH}", "layout.shard=1", "layout.replicate=3", "layout.min_replicate=1"]
    with cluster_of(1, 1) as cluster:

        def lose(progress: Progress) -> None:
            if progress.step >= 25 and len(cluster.worker_nodes) == 2:
                [node] = [node for node in cluster.worker_nodes if progress.pid in below(node)]
                cluster.remove_node(node, allow_graceful=False)

        launch(read_train_config(file, settings), "pretrain", on_progress=lose)
    assert list(dict.fromkeys(sizes)) == [2, 1]
    with Session.start(num_cpus=3):
        whole = ["layout.replicate=1", "layout.min_replicate=0", f"run={tmp_path / 'whole'}"]
        launch(read_train_config(file, [*settings, *whole]), "pretrain")
    losses, expected = ([row.loss for row in read_metrics(tmp_path / run)] for run in ("run", "whole"))
    assert len(losses) == 60
    assert losses == pytest.approx(expected, abs=1e-5)


def below(node: object) -> set[int]:
    return descendants(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


def test_a_run_killed_with_all_of_its_processes_goes_on(file: Path, tmp_path: Path) -> None:
    """As a machine does that loses power: command, Ray and workers end at once, three times, at random moments."""
    chance = random.Random(5)
    command = [sys.executable, "-m", "rayllm", "train", "pretrain", "--config", str(file), "--json"]
    for kill in range(3):
        target = 15 * kill + chance.randrange(5, 15)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 180
        while ((newest := read_progress(tmp_path / "run")) is None or newest.step < target) and process.poll() is None:
            assert time.monotonic() < deadline, "the run does not come so far"
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
        everything = descendants(process.pid) | {process.pid}
        for pid in everything:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()
        assert wait_gone(everything, 10) == set()
        for saved in SavedRun(tmp_path / "run").all():
            saved.verify()
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    with Session.start(num_cpus=3):
        launch(read_train_config(file, [f"run={tmp_path / 'whole'}"]), "pretrain")
    losses, expected = ([row.loss for row in read_metrics(tmp_path / run)] for run in ("run", "whole"))
    assert len(losses) == 60
    assert losses == expected


def test_a_rank_that_stalls_is_an_error_with_a_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "_COLLECTIVE_TIMEOUT_S", 5)
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step >= 12 and not stopped:
            stopped.append(progress.pid)
            os.kill(progress.pid, signal.SIGSTOP)

    with (
        Session.start(num_cpus=3),
        pytest.raises(TrainingError, match=r"rank 1 waited longer than 5 s for another rank, which stalls$"),
    ):
        launch(read_train_config(file, ["restarts=0", "schedule.steps=4000"]), "pretrain", on_progress=stop)
    assert stopped
    assert wait_gone(set(stopped), 10) == set()
