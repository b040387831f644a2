"""Calls that wait for another machine, many at once."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_parallel(calls: Sequence[Callable[[], T]], *, workers: int) -> Iterator[tuple[int, T]]:
    """Index and result of each, as they are done. Raises what one of them raises.

    Once its reader leaves, for an error or Ctrl-C, no other call begins, and nobody waits for those that have: an
    endpoint that says nothing would hold up the end of the process else. Hence no executor, whose threads it joins.
    """
    waiting = deque(enumerate(calls))
    done: queue.SimpleQueue[tuple[int, Future[T]]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            try:
                index, call = waiting.popleft()
            except IndexError:
                return
            future: Future[T] = Future()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is read
                future.set_exception(error)
            done.put((index, future))

    for _ in range(min(workers, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in calls:
            index, future = done.get()
            yield index, future.result()
    finally:
        waiting.clear()
