"""`python -m rayllm.eval.sandbox.launcher`: starts one confined process, and ends it when it is told to.

Its order is the first line of stdin, as JSON. When stdin ends after that, so does the confined process. What keeps it
from confining goes to stderr, and then nothing has been run.
"""

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
OUT_OF_TIME = 72  # the exit status where the confined process used up its processor time

_SPARE_USERS = 1_900_000_000  # above every range that systemd, subuid and directories hand out
_NOT_CONFINED = 71
_CLOCK_TICK_S = 0.1  # the limit is kept to the tick, the accounts are exact


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
    _watch(confined, jail.limits.cpu_s - _CLOCK_TICK_S)


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


def _watch(confined: int, cpu_s: float) -> None:
    """Until the process ends or stdin does. Does not return."""
    process = os.pidfd_open(confined)
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.poll()
    os.kill(confined, signal.SIGKILL)  # if it has ended it waits to be reaped, so this hits nobody else
    _, _, usage = os.wait4(confined, 0)
    os._exit(OUT_OF_TIME if usage.ru_utime + usage.ru_stime >= cpu_s else 0)


if __name__ == "__main__":
    main()
