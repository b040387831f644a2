"""A run as MLflow tracks it: its configuration as params, the figures of metrics.parquet as metrics.

The process that starts the workers tells MLflow what is in the run's folder: no step waits for a server, and one that
was away is told later. Knows no tensors and no ranks.
"""

import importlib.util
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from rayllm.core.errors import ConfigError
from rayllm.train.config import TrainConfig
from rayllm.train.origin import write_origin
from rayllm.train.progress import METRICS, Progress, figures, read_metrics

logger = logging.getLogger(__name__)

_NAME = "mlflow.json"
_DEFAULTS = {  # in place of minutes of waiting, and of reports to its makers
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_LOOK_S = 10.0  # between two looks at the metrics, as often as they are written
_END_S = 30.0  # that the end of a run may wait for MLflow
_ROWS = 20  # in one request, which MLflow takes whole up to 1,000 metrics


class MlflowRun:
    """While the block runs, MLflow is told of each new step, and at its end of how it ended. A run that is started
    again goes on with its MLflow run, if that is of the same server and experiment, and MLflow is told what it has
    missed; a step that is done again has two values there.

    ConfigError where the package is missing or the server cannot be used; one that fails later costs a warning."""

    def __init__(self, config: TrainConfig, recipe: str) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError("mlflow: needs mlflow-skinny; install it with: pip install 'rayllm[mlflow]'")
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # brings more than a second of imports

        self._folder, self._told = Path(config.run), set[tuple[int, int]]()
        self._over, self._status, self._warned, self._complete = threading.Event(), "", False, False
        params, rows = dict(_params({"recipe": recipe, **msgspec.to_builtins(config)})), read_metrics(self._folder)
        uri = config.mlflow.tracking_uri
        try:
            self._client = MlflowClient(uri)
            self._run_id = self._begun(config, params, rows)
        except Exception as error:  # stores raise what they like, even a bare Exception
            raise ConfigError(f"mlflow.tracking_uri: {uri} cannot be used: {_first_line(error)}") from error
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._over.set()
        self._thread.join(_END_S)
        if not self._complete:
            logger.warning("%s: MLflow was not told of all of it; started again, the run tells the rest", self._folder)

    def _begun(self, config: TrainConfig, params: Mapping[str, str], rows: Iterable[Progress]) -> str:
        """-> the id of the MLflow run, made now or by an earlier start. `rows`: of earlier starts."""
        from mlflow.entities import Param

        path, target, client = self._folder / _NAME, msgspec.to_builtins(config.mlflow), self._client
        origin = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        run_id: str = origin.pop("run_id", "")
        kept: Mapping[str, str] = {}
        if origin == target:
            kept = client.get_run(run_id).data.params
            client.update_run(run_id, status="RUNNING")
            steps = {metric.step for metric in client.get_metric_history(run_id, "loss")}
            self._told = {(row.step, row.pid) for row in rows if row.step in steps}
        else:
            name = config.mlflow.experiment
            experiment = client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else client.create_experiment(name)
            run_id = client.create_run(number, run_name=self._folder.name).info.run_id
            write_origin(self._folder, _NAME, {**target, "run_id": run_id})
        if changed := [name for name, value in params.items() if kept.get(name, value) != value]:
            logger.warning("%s: MLflow keeps the first value of %s", self._folder, ", ".join(changed))
        client.log_batch(run_id, params=[Param(name, value) for name, value in params.items() if name not in kept])
        return run_id

    def _follow(self) -> None:
        over = False
        while not over:
            over = self._over.wait(_LOOK_S)
            try:
                self._tell()
                if over:
                    self._client.set_terminated(self._run_id, self._status)
                    self._complete = True
            except Exception as error:  # noqa: BLE001 - as above
                if not self._warned:
                    logger.warning("%s goes on, but MLflow cannot be told: %s", self._folder, _first_line(error))
                self._warned = True

    def _tell(self) -> None:
        """Of each step once as each process did it."""
        from mlflow.entities import Metric

        rows = self._new_rows()
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            metrics = [
                Metric(name, value, round(ended * 1000), row.step)
                for row, ended in part
                for name, value in figures(row).items()
            ]
            self._client.log_batch(self._run_id, metrics)
            self._told.update((row.step, row.pid) for row, _ in part)

    def _new_rows(self) -> list[tuple[Progress, float]]:
        """-> rows and when their steps ended, in seconds since the epoch: the last one as the file was written."""
        path = self._folder / METRICS
        if not path.exists():
            return []
        ended, rows = path.stat().st_mtime, []
        for row in reversed(read_metrics(self._folder)):
            if (row.step, row.pid) not in self._told:
                rows.append((row, ended))
            ended -= row.seconds
        return rows[::-1]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _params(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by the names that --set knows, but for where MLflow is."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            if name != "mlflow":
                yield from _params(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
