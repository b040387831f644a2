"""What runs on this machine, by process id."""

import os
import time
from pathlib import Path


def descendants(pid: int) -> set[int]:
    """Every living process below `pid`; zombies, which only wait to be counted, are left out."""
    parent_of = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if fields[0] != "Z":
            parent_of[int(stat.parent.name)] = int(fields[1])
    found: set[int] = set()
    layer = {pid}
    while layer := {child for child, parent in parent_of.items() if parent in layer} - found:
        found |= layer
    return found


def alive(pids: set[int]) -> set[int]:
    living = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            living.add(pid)
    return living


def wait_gone(pids: set[int], timeout_s: float) -> set[int]:
    """Those that are still there when the time is up."""
    deadline = time.monotonic() + timeout_s
    while (left := alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def processor_seconds(pid: int) -> float:
    """What the process has used, its children not. Raises OSError when it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
