"""Ports for endpoints that a test starts."""

import random
import socket
from contextlib import suppress

# Below those that the kernel gives to connections (from 32768), of which Ray opens many before an endpoint comes to use
# its port, and above those that `rayllm.serve.local` and Serve's replicas choose from.
_PORTS = range(31001, 32768)


def free_ports(count: int) -> list[int]:
    free: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("0.0.0.0", port))
            free.append(port)
        if len(free) == count:
            return free
    raise RuntimeError(f"no {count} free ports in {_PORTS.start}-{_PORTS.stop - 1}")
