"""Many calls at once, of which some never end."""

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from rayllm.eval.workers import in_parallel


@pytest.fixture
def stuck() -> Iterator[Callable[[], int]]:
    """A call that ends with the test."""
    end = threading.Event()

    def call() -> int:
        end.wait(60)
        return 0

    yield call
    end.set()


def test_all_are_given_with_their_numbers() -> None:
    calls = [partial(pow, 2, number) for number in range(100)]
    for workers in (1, 7, 1000):
        assert dict(in_parallel(calls, workers=workers)) == {number: 2**number for number in range(100)}
    assert list(in_parallel([], workers=3)) == []


def test_no_more_run_at_once_than_there_are_workers() -> None:
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(4)

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(30)
        with lock:
            running -= 1

    assert len(list(in_parallel([call] * 12, workers=4))) == 12
    assert most == 4


def test_an_error_is_told_while_others_are_stuck(stuck: Callable[[], int]) -> None:
    def broken() -> int:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        list(in_parallel([stuck, broken], workers=2))


def test_whoever_leaves_begins_no_other_call() -> None:
    begun: list[int] = []
    go_on = threading.Event()
    before = set(threading.enumerate())
    calls = [partial(int, 7), partial(go_on.wait, 30), *(partial(begun.append, number) for number in range(5))]
    answers = in_parallel(calls, workers=1)
    assert next(answers) == (0, 7)
    answers.close()
    (worker,) = set(threading.enumerate()) - before
    go_on.set()
    worker.join(30)
    assert not begun
