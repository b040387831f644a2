"""What MLflow hears of a run: by the real client, into files; and what a run hears of an MLflow that is away."""

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest

from rayllm.core.errors import ConfigError, TrainingError
from rayllm.train import mlflow as tracking
from rayllm.train.config import TrainConfig
from rayllm.train.config_file import read_train_config
from rayllm.train.mlflow import MlflowRun
from rayllm.train.progress import METRICS, Progress, ProgressWriter
from tests.progress_rows import progress

SMALL = ["model.start=tiny", "data.path=d", "batch.sequence_length=64", "batch.tokens=512", "schedule.steps=9"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_LOOK_S", 0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def configured(tmp_path: Path, *settings: str) -> TrainConfig:
    file = tmp_path / "train.toml"
    file.write_text(f'run = "{tmp_path / "tiny"}"\n[mlflow]\ntracking_uri = "{tmp_path / "store"}"\n')
    return read_train_config(file, [*SMALL, "optimizer.learning_rate=1e-3", *settings])


def write(config: TrainConfig, *rows: Progress, after: int = 0) -> None:
    writer = ProgressWriter(Path(config.run), after)
    for row in rows:
        writer.add(row)
    writer.close()


def tracked(tmp_path: Path, experiment: str = "Default"):
    """-> the client and the experiment's runs, the newest first."""
    client = mlflow.MlflowClient(str(tmp_path / "store"))
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def history(client, run, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))


def test_every_setting_and_every_figure_of_every_step(tmp_path: Path) -> None:
    config = configured(tmp_path, "mlflow.experiment=cats", "checkpoint.every_steps=3")
    with MlflowRun(config, "dpo"):
        write(config, *(progress(step, 2.5 / step, margin=0.5 * step) for step in range(1, 120)))
    client, [run] = tracked(tmp_path, "cats")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    params = run.data.params
    assert (params["recipe"], params["batch.tokens"], params["checkpoint.every_steps"]) == ("dpo", "512", "3")
    assert not any(name.startswith("mlflow") for name in params)
    rows = pq.read_table(Path(config.run) / METRICS).to_pylist()
    names = [name for name in rows[0] if name not in ("step", "steps", "pid", "mfu")]
    assert sorted(run.data.metrics) == sorted(names)
    for name in names:
        assert history(client, run, name) == [(row["step"], row[name]) for row in rows]
    times = [metric.timestamp for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert times == [times[-1] - 2000 * left for left in reversed(range(119))]
    assert abs(times[-1] / 1000 - (Path(config.run) / METRICS).stat().st_mtime) < 0.001


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Step 3 came after the last checkpoint, so that it is done again; step 4 is new, and so is a setting."""
    config = configured(tmp_path)
    write(config, progress(1, 3.0), progress(2, 2.0), progress(3, 1.5))
    with pytest.raises(TrainingError), MlflowRun(config, "sft"):
        raise TrainingError("lost")
    client, [run] = tracked(tmp_path)
    assert run.info.status == "FAILED"
    with MlflowRun(configured(tmp_path, "schedule.steps=20"), "sft"):
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
        write(config, progress(3, 1.25, pid=2), progress(4, 1.0, pid=2), after=2)
    client, [run] = tracked(tmp_path)
    assert run.info.status == "FINISHED"
    assert history(client, run, "loss") == [(1, 3.0), (2, 2.0), (3, 1.25), (3, 1.5), (4, 1.0)]
    assert run.data.params["schedule.steps"] == "9"
    assert [record.getMessage() for record in caplog.records] == [
        f"{config.run}: MLflow keeps the first value of schedule.steps"
    ]


def test_another_experiment_hears_of_the_whole_run(tmp_path: Path) -> None:
    config = configured(tmp_path)
    write(config, progress(1, 3.0))  # before MLflow was asked for
    with pytest.raises(KeyboardInterrupt), MlflowRun(config, "sft"):
        raise KeyboardInterrupt
    with MlflowRun(configured(tmp_path, "mlflow.experiment=cats"), "sft"):
        write(config, progress(2, 2.0, pid=2), after=1)
    client, [first] = tracked(tmp_path)
    assert (first.info.status, history(client, first, "loss")) == ("KILLED", [(1, 3.0)])
    client, [second] = tracked(tmp_path, "cats")
    assert history(client, second, "loss") == [(1, 3.0), (2, 2.0)]


def test_a_store_that_was_away_is_told_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, store = configured(tmp_path), tmp_path / "store"
    with MlflowRun(config, "sft"):
        store.rename(tmp_path / "away")
        write(config, progress(1, 3.0))
        while not caplog.records:
            time.sleep(0.01)
        (tmp_path / "away").rename(store)
    client, [run] = tracked(tmp_path)
    assert (run.info.status, history(client, run, "loss")) == ("FINISHED", [(1, 3.0)])
    [record] = caplog.records
    assert f"{config.run} goes on, but MLflow cannot be told: " in record.getMessage()


class Server(BaseHTTPRequestHandler):
    """As much of MLflow's REST interface as a run needs, until it is to fall silent."""

    told: list[dict]
    silent: threading.Event
    over: threading.Event

    def do_GET(self) -> None:
        self._answer({"experiment": {"experiment_id": "7", "name": "Default"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.silent.is_set():
            self.over.wait()
            return
        self.told.append(body)
        self._answer({"run": {"info": {"run_id": "abc", "run_uuid": "abc"}}} if self.path.endswith("create") else {})

    def _answer(self, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[type[Server], str]]:
    handler = type("Handler", (Server,), {"told": [], "silent": threading.Event(), "over": threading.Event()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever).start()
        yield handler, f"http://127.0.0.1:{http.server_port}"
        handler.over.set()
        http.shutdown()


def test_a_server_that_falls_silent_holds_nothing_up(
    tmp_path: Path, server: tuple[type[Server], str], caplog: pytest.LogCaptureFixture
) -> None:
    handler, uri = server
    config = configured(tmp_path, f"mlflow.tracking_uri={uri}")
    with MlflowRun(config, "sft"):
        write(config, progress(1, 3.0))
        while not any("metrics" in body for body in handler.told):
            time.sleep(0.01)
        handler.silent.set()
        write(config, progress(2, float("nan")), after=1)
    metrics = [metric for body in handler.told for metric in body.get("metrics", ())]
    assert {(metric["step"], metric["value"]) for metric in metrics if metric["key"] == "loss"} == {(1, 3.0)}
    away, incomplete = [record.getMessage() for record in caplog.records]
    assert "MLflow cannot be told: " in away
    assert "timed out" in away
    assert "MLflow was not told of all of it" in incomplete


def test_a_server_that_cannot_be_used_is_said_at_the_start(tmp_path: Path, server: tuple[type[Server], str]) -> None:
    handler, uri = server
    handler.silent.set()
    with pytest.raises(ConfigError, match=rf"mlflow.tracking_uri: {uri} cannot be used: .* timed out"):
        MlflowRun(configured(tmp_path, f"mlflow.tracking_uri={uri}"), "sft")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"mlflow.tracking_uri: {uri} cannot be used: .*refused"):
            MlflowRun(configured(tmp_path, f"mlflow.tracking_uri={uri}"), "sft")
    with pytest.raises(ConfigError, match=r"mlflow.tracking_uri: nowhere://x cannot be used"):
        MlflowRun(configured(tmp_path, "mlflow.tracking_uri=nowhere://x"), "sft")
    assert not (tmp_path / "tiny").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'rayllm\[mlflow\]'"):
        MlflowRun(configured(tmp_path), "sft")


def test_an_experiment_of_no_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mlflow.tracking_uri: names no server"):
        configured(tmp_path, 'mlflow.tracking_uri=""', "mlflow.experiment=cats")
