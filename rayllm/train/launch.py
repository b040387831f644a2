"""A run on Ray Train: workers, a process group among them, and new ones where one is lost.

The only file of training that knows Ray. Workers keep nothing that is not in the run's folder: when one dies, Ray Train
ends the others, and all of them are started again, as many as there is room for, and go on from the last checkpoint.
"""

import fcntl
import itertools
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from rayllm.core.errors import ConfigError, DivergedError, RayLLMError, TrainingError
from rayllm.train.config import TrainConfig
from rayllm.train.mlflow import MlflowRun
from rayllm.train.progress import Progress, read_progress
from rayllm.train.recipes import RECIPES
from rayllm.train.samples import sample_after, sample_before
from rayllm.train.saved import SavedRun
from rayllm.train.trainer import check, train
from rayllm_cluster.errors import SessionError
from rayllm_cluster.session import Session

logger = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT_S = 300  # a rank that says nothing for so long is taken for lost
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)  # as gloo and NCCL word it
_POLL_S = 0.2
_ROOM_S = 2.0  # between two looks at how much room there is


class _LostError(TrainingError):
    """What ended the run need not come again."""


def launch(
    config: TrainConfig,
    recipe: str,
    *,
    address: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Returns when the run is over. `address`: of a cluster; None: this machine, or the cluster at RAY_ADDRESS. The
    prompts of `config.samples` are answered in this process, when no worker runs.

    Raises what `check` does, before any worker starts; TrainingError if the run fails more often than it may, or for
    what would fail again.
    """
    check(config, RECIPES[recipe])
    with _alone(config), MlflowRun(config, recipe) if config.mlflow.tracking_uri else nullcontext():
        sample_before(config)
        try:
            session = Session.start(address=address, num_cpus=config.layout.world + 1)
        except SessionError as error:
            raise TrainingError(str(error)) from error
        with session, _watched(Path(config.run), on_progress):
            _run(config, recipe)
        sample_after(config)


@contextmanager
def _alone(config: TrainConfig) -> Iterator[None]:
    """In the run's folder, which is made. ConfigError if it cannot be, or if another run is in it."""
    run = Path(config.run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"run: {run} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run: another `rayllm train` is at work in {run}") from None
        except OSError as error:  # some shared file systems have no locks
            logger.warning("nothing keeps a second run out of %s: %s", run, error.strerror)
        SavedRun(run).remove_leftovers()  # a full disk may lack just their room
        yield


def _run(config: TrainConfig, recipe: str) -> None:
    """Until it is over; again where it failed."""
    for failures in itertools.count(1):
        try:
            _fit(_sized(config), recipe)
        except _LostError as error:
            if failures > config.restarts:
                raise
            saved = SavedRun(Path(config.run)).latest()
            where = "there was no checkpoint yet: again from the start" if saved is None else "from its last checkpoint"
            logger.warning("%s; going on, %s (%d of %d)", error, where, failures, config.restarts)
        else:
            return


def _sized(config: TrainConfig) -> TrainConfig:
    """With as many groups as there is room for; waits for the least that may be. Says that the run will wait."""
    layout = config.layout
    if not layout.min_replicate:
        room = max(_there_are("GPU"), _there_are("CPU"))
        if room < layout.world:
            logger.warning("%s: waiting for room for %d workers, of which %d have it", config.run, layout.world, room)
        return config  # Ray waits, and asks its autoscaler
    waits = False
    while (number := _largest(config)) is None:
        if not waits:
            logger.warning("%s: waiting for room for %d groups", config.run, config.replicates[0])
        waits = True
        time.sleep(_ROOM_S)
    return replace(config, layout=replace(layout, replicate=number))


def _largest(config: TrainConfig) -> int | None:
    """How many groups the cluster has room for, of the numbers that may be."""
    groups = (_there_are("GPU") or _there_are("CPU")) * config.layout.replicate // config.layout.world
    return max((number for number in config.replicates if number <= groups), default=None)


def _there_are(resource: str) -> int:
    """In the whole cluster."""
    import ray

    return int(ray.cluster_resources().get(resource, 0))


def _fit(config: TrainConfig, recipe: str) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from rayllm_cluster.torch_config import ReachableTorchConfig

    use_gpu = _there_are("GPU") >= config.layout.world
    scratch = Path(config.run).resolve() / ".ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": msgspec.to_builtins(config),
            "recipe": recipe,
            "directory": os.getcwd(),
            "timeout_s": _COLLECTIVE_TIMEOUT_S,
        },
        torch_config=ReachableTorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=ScalingConfig(num_workers=config.layout.world, use_gpu=use_gpu),
        run_config=RunConfig(
            name=f"launch-{time.time_ns()}",  # Ray's own record of an earlier one is nothing to go on from
            storage_path=str(scratch),
            # A lost node counts as room until Ray has missed it; then fewer groups are to start instead of all waiting.
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0 if config.layout.min_replicate else -1
            ),
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        cause = _cause(error)
        failure = _LostError if _need_not_come_again(cause) else TrainingError
        raise failure(f"the run failed: {_line(cause)}") from error
    except SystemExit as stopped:  # how Ray Train answers Ctrl-C, once its workers are gone
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        shutil.rmtree(scratch, ignore_errors=True)


def _worker(arguments: dict[str, Any]) -> None:
    """On each worker, with a process group."""
    import ray.train
    import ray.train.torch
    import torch

    config = msgspec.convert(arguments["config"], TrainConfig)
    # Ray Train puts a worker into a folder of its own, which goes with it; paths are from where the run was started.
    if os.path.isdir(arguments["directory"]):
        os.chdir(arguments["directory"])
    local = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    try:
        train(config, RECIPES[arguments["recipe"]], ray.train.torch.get_device())
    except RuntimeError as error:
        if not _TIMED_OUT.search(str(error)):
            raise
        rank, limit = ray.train.get_context().get_world_rank(), arguments["timeout_s"]
        raise TrainingError(f"rank {rank} waited longer than {limit} s for another rank, which stalls") from error


def _cause(error: Exception) -> Exception:
    """What the workers say: an error of ours before one that only followed from it."""
    failures = [cause for _, cause in sorted(getattr(error, "worker_failures", {}).items())]
    causes = [getattr(failure, "cause", None) or failure for failure in failures]
    causes.sort(key=lambda cause: not isinstance(cause, RayLLMError))
    return causes[0] if causes else error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _need_not_come_again(cause: Exception) -> bool:
    """Not so what is wrong with data, a checkpoint or the numbers themselves."""
    if isinstance(cause, RayLLMError):
        return isinstance(cause, TrainingError) and not isinstance(cause, DivergedError)
    return True


@contextmanager
def _watched(run: Path, on_progress: Callable[[Progress], None]) -> Iterator[None]:
    """Tells of each new step, from a thread, while the block runs."""
    over = threading.Event()
    before = read_progress(run)

    def watch(last: Progress | None) -> None:
        while True:
            ends = over.wait(_POLL_S)
            if (newest := read_progress(run)) is not None and newest != last:
                on_progress(newest)
                last = newest
            if ends:
                return

    thread = threading.Thread(target=watch, args=(before,), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
