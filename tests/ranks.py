"""A few processes that form a gloo world of any size up to their number, one world after another.

They are forked from a server that has imported torch once, so that nine cost little more than one.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60


class Ranks:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "tests.ranks", "rayllm.parallel.load"])
        self._directory = tempfile.TemporaryDirectory()
        self._worlds = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank of a new world; their results by rank. A rank's failure is raised here."""
        self._worlds += 1
        store = Path(self._directory.name) / f"store-{self._worlds}"
        for rank in range(world_size):
            self._pipes[rank].send((store, rank, world_size, function, args))
        answers = []
        for rank in range(world_size):
            assert self._pipes[rank].poll(TIMEOUT_S), f"rank {rank} does not answer"
            answers.append(self._pipes[rank].recv())
        failures = [f"rank {rank}: {value}" for rank, (ok, value) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(TIMEOUT_S)
            process.close()
        self._directory.cleanup()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        store, rank, world_size, function, args = job
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        try:
            pipe.send((True, function(*args)))
        except BaseException:  # noqa: BLE001  reported to the test, which fails with it
            pipe.send((False, traceback.format_exc()))
        finally:
            dist.destroy_process_group()
