"""`python -m rayllm.eval.sandbox.launcher`: starts one confined process, and ends it when it is told to.

Its order is the first line of stdin, as JSON. When stdin ends after that, so does the confined process. What keeps it
from confining goes to stderr, and then nothing has been run.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from rayllm.eval.sandbox.jail import Isolation, Jail, Limits
from rayllm.eval.sandbox.judge import Program, judge
from rayllm.eval.sandbox.program import serve_program
from rayllm.eval.sandbox.wire import Channel

PROGRAM, JUDGE = "program", "judge"
# The exit status where the confined process used up its processor time, or its directory.
OUT_OF_TIME, OUT_OF_SPACE = 72, 73

_SPARE_USERS = 1_900_000_000  # above every range that systemd, subuid and directories hand out
_NOT_CONFINED = 71
# Of the processor time that it may use, by the exact account. For the limit the kernel samples at its clock's ticks,
# which on a busy machine counts a tenth too much and more.
_SURELY_USED = 0.5
_LOOK_MS = 50  # how often the directory is measured
_BLOCK_BYTES = 512  # the unit of st_blocks
_NAME_BYTES = 1 << 14  # even an empty file takes room, and time to be removed


def main() -> None:
    sys.path.remove(os.environ.pop("PYTHONPATH"))
    with os.fdopen(os.dup(0), "rb") as orders:
        order: dict[str, Any] = json.loads(orders.readline())
    jail = Jail(
        isolation=Isolation(order["isolation"]),
        limits=Limits(**order["limits"]),
        directory=order["directory"],
        readable=tuple(order["readable"]),
        spare_user=_SPARE_USERS + os.getpid(),
    )
    try:
        jail.unshare()
    except OSError as error:
        sys.exit(str(error))
    confined = os.fork()
    if confined == 0:
        _be_confined(jail, order)
    _watch(confined, jail)


def _be_confined(jail: Jail, order: dict[str, Any]) -> None:
    """Does not return."""
    role = _play_judge if order["role"] == JUDGE else _play_program
    try:
        jail.confine(order["keep"])
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(_NOT_CONFINED)
    role(Channel(socket.socket(fileno=order["keep"][0])), order)
    os._exit(0)


def _play_program(channel: Channel, order: dict[str, Any]) -> None:
    serve_program(channel, order["source"])


def _play_judge(channel: Channel, order: dict[str, Any]) -> None:
    """Says "ready" when the program's process is, then the verdict: null, or what went wrong."""
    program = Program(channel)
    verdict = order["keep"][1]
    if not program.wait_until_ready():
        return
    os.write(verdict, b'"ready"\n')
    problem = judge(program, setup=order["setup"], tests=order["tests"], names=frozenset(order["names"]))
    os.write(verdict, json.dumps(problem).encode() + b"\n")


def _watch(confined: int, jail: Jail) -> None:
    """Until the process ends, stdin does, or its directory is full. Does not return."""
    process = os.pidfd_open(confined)
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    look_ms = (
        _LOOK_MS if jail.isolation is Isolation.LANDLOCK else None
    )  # a file system of its own is as large as it may
    is_full = False
    while not is_full and not poll.poll(look_ms):
        is_full = _bytes_in(jail.directory) > jail.limits.file_bytes
    os.kill(confined, signal.SIGKILL)  # if it has ended it waits to be reaped, so this hits nobody else
    _, status, usage = os.wait4(confined, 0)
    if is_full:
        os._exit(OUT_OF_SPACE)
    was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    used_s = usage.ru_utime + usage.ru_stime
    os._exit(OUT_OF_TIME if was_killed and used_s >= _SURELY_USED * jail.limits.cpu_s else 0)


def _bytes_in(directory: str) -> int:
    """It has no folders. What is deleted but still open is not seen: the limits on files and memory bound that."""
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES + _NAME_BYTES
    return total


if __name__ == "__main__":
    main()
