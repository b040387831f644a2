"""The processes of one epoch of a group: started, watched and killed through Ray, and on this node by their ids too."""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllm_cluster.errors import RemoteError, ShardLostError
from rayllm_cluster.hub import DIED
from rayllm_cluster.placement import Placement
from rayllm_cluster.shard import Shard, ShardSpec

logger = logging.getLogger(__name__)

STOPPED = "its process is stopped"

# A stopped process does not hear Ray, which waits five seconds before it kills by force.
_HEED_S = 0.5
_GONE_S = 5.0
_ROOT_CAUSE_S = 0.2
_STACKS_S = 0.2


class _Process(NamedTuple):
    """Of a member on this node."""

    rank: int
    pid: int
    fd: int  # of the process, as long as it is open not of another that has the same id


class Members:
    """One actor for each spec, in the bundle of its rank; each enters `Shard.run` at once. Thread-safe.

    `seen`: when `lost` last found nothing wrong with any of them.
    """

    def __init__(self, specs: Sequence[ShardSpec], placement: Placement) -> None:
        self.seen = time.monotonic()
        self._lock = threading.Lock()
        self._processes: list[_Process] = []
        self._stopped: set[int] = set()  # ranks, at the last look
        self._actors: list[Any] = []
        self._killed = False
        for spec, slot in zip(specs, placement.slots, strict=True):
            strategy = PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=slot.bundle_index)
            actor = ray.remote(Shard).options(
                num_cpus=placement.shard.get("CPU", 0),
                num_gpus=placement.shard.get("GPU", 0),
                scheduling_strategy=strategy,
                max_restarts=0,
            )
            self._actors.append(actor.remote(spec))
        self._runs = [actor.run.remote() for actor in self._actors]

    def watch_process(self, rank: int, pid: int) -> None:
        """Of a member on this node, while it is known to live. In another container it may have no id here."""
        with self._lock, contextlib.suppress(OSError):
            if not self._killed:
                self._processes.append(_Process(rank, pid, os.pidfd_open(pid)))

    def lost(self, timeout_s: float) -> ShardLostError | None:
        """A member that has ended, or is stopped now and was at the last call; waits so long for one to end."""
        if not ray.is_initialized():  # else `wait` would start a Ray of its own
            return ShardLostError(0, "Ray was shut down")
        if not ray.wait(self._runs, num_returns=1, timeout=timeout_s)[0]:
            return self._look_for_stopped()
        if self._killed:  # this is how they ended
            return None
        # As in the hub: behind a shard that failed there may be one that died.
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=_ROOT_CAUSE_S)
        losses = [self._loss(self._runs.index(run)) for run in ended]
        return next((loss for loss in losses if not loss.error), losses[0])

    def wait_ended(self, timeout_s: float) -> None:
        """Until all have left their loops."""
        if ray.is_initialized():
            ray.wait(self._runs, num_returns=len(self._runs), timeout=timeout_s)

    def dump_stacks(self) -> None:
        """Each process on this node writes where it is to its log."""
        self._signal(signal.SIGUSR1)
        time.sleep(_STACKS_S)

    def kill(self) -> None:
        """Those that are stopped too. Idempotent. When it returns, no process that had connected is left on this node;
        those that were still starting, whose ids nobody knows, Ray ends soon after."""
        with self._lock:
            if self._killed:
                return
            self._killed = True
            if ray.is_initialized():
                for actor in self._actors:
                    ray.kill(actor, no_restart=True)
            if self._stopped or not self._all_gone(_HEED_S):
                self._signal(signal.SIGKILL)
                if not self._all_gone(_GONE_S):
                    logger.error("A shard's process did not end within %g s of being killed", _GONE_S)
            for process in self._processes:
                os.close(process.fd)
            self._processes.clear()

    def _look_for_stopped(self) -> ShardLostError | None:
        """The node knows, and is never wrong about it: a process that is merely starved of time counts as running.

        Only one that stays stopped is lost, since a profiler or a debugger stops a process for a moment.
        """
        with self._lock:
            stopped = {process.rank for process in self._processes if _is_stopped(process.pid)}
        lost, self._stopped = stopped & self._stopped, stopped
        if not stopped:
            self.seen = time.monotonic()
        return ShardLostError(min(lost), STOPPED) if lost else None

    def _loss(self, rank: int) -> ShardLostError:
        try:
            failure = ray.get(self._runs[rank])
        except ray.exceptions.OutOfMemoryError:
            return ShardLostError(rank, "killed by Ray because its node was running out of memory")
        except ray.exceptions.RayError as error:
            logger.error("Ray on shard %d: %s", rank, error)
            return ShardLostError(rank, DIED)
        if failure is None:
            return ShardLostError(rank, "its connection to the driver broke")
        raised = RemoteError.decode(failure)
        return ShardLostError(rank, str(raised), error=raised)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.fd, number)

    def _all_gone(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        for process in self._processes:
            poll.register(process.fd, select.POLLIN)
        left = len(self._processes)
        while left and (remaining := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(remaining * 1000):
                poll.unregister(fd)
                left -= 1
        return left == 0


def _is_stopped(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("T", "t")
