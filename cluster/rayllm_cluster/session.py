"""The connection to Ray: joined where there is one, started where there is none. What was started here ends here."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from rayllm_cluster.errors import SessionError

# Frames go over sockets and weights are read from disk, so the object store is all but unused.
_OBJECT_STORE_BYTES = 128 << 20
_CONNECT_S = 10.0


class Session:
    """A context manager; `stop` is idempotent and returns when every process that was started is gone."""

    def __init__(self, *, owned: bool) -> None:
        self._owned = owned

    @classmethod
    def start(cls, *, address: str | None = None, num_cpus: int | None = None) -> Self:
        """Join the Ray that this process is connected to, or the cluster at `address` (else at RAY_ADDRESS); if none
        of these is given, start Ray on this machine, with `num_cpus` logical CPUs if that is more than it has.

        A Ray started here asks every client for a token, as Ray does by default, unless RAY_AUTH_MODE says otherwise.
        """
        address = address or os.environ.get("RAY_ADDRESS")
        if address is None:
            # Ray reads it when it is first imported; said here, Ray need not choose, and warn of its choice.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            # Ray's processes are forked, to become other programs at once. Where gRPC's threads are at work its
            # handlers abort some of them before they do; it looks here when it is first used.
            os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        import ray

        if ray.is_initialized():
            return cls(owned=False)
        try:
            if address is not None:
                _check_reachable(address)
                with _sigterm_left_to_python():
                    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                with _signals_held(), _sigterm_left_to_python():
                    _start_local(num_cpus)
        except Exception as error:  # Ray raises that too, as it is
            ray.shutdown()
            where = f"cannot join the Ray cluster at {address}" if address else "cannot start Ray on this machine"
            reason = str(error).splitlines() or [type(error).__name__]
            raise SessionError(f"{where}: {reason[0]}") from error
        except BaseException:
            ray.shutdown(wait_for_processes=True)
            raise
        return cls(owned=True)

    def stop(self) -> None:
        if self._owned:
            import ray

            self._owned = False
            ray.shutdown(wait_for_processes=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _check_reachable(address: str) -> None:
    """Ray itself tries for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


@contextmanager
def _signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end: Ray, interrupted as it starts, forgets the processes it has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is hold:  # else Ray has set its own
                signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _sigterm_left_to_python() -> Iterator[None]:
    """Ray's core installs a handler under Python's: it writes a stack trace, calls Python's, and three seconds later
    aborts a process that is still cleaning up."""
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
            signal.alarm(0)  # the abort, if the signal came while Ray started


def _start_local(num_cpus: int | None) -> None:
    import ray

    # As Ray does when it has chosen itself: it may have been imported before RAY_AUTH_MODE was set.
    ray._raylet.Config.initialize("")
    ray.init(
        "local",
        num_cpus=max(num_cpus or 1, len(os.sched_getaffinity(0))),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
