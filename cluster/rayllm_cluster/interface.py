"""Where gloo listens.

Left alone it looks up the machine's name, which need not resolve, or resolves to loopback, where no other machine
connects.
"""

import fcntl
import os
import socket
import struct
from typing import Final

LOOPBACK: Final = "127.0.0.1"

_SIOCGIFADDR: Final = 0x8915
_ANY_PORT: Final = 9  # nothing is sent


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None: no interface of this machine has it."""
    if address == LOOPBACK:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def listen_towards(host: str) -> None:
    """Have gloo listen, in this process, on the interface by which it reaches `host`: on loopback for LOOPBACK.

    GLOO_SOCKET_IFNAME, where a user has set it, is left as it is.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _ANY_PORT))
        except OSError:  # no IPv4 address, or no way there: gloo will say so itself
            return
        name = interface_of(probe.getsockname()[0])
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
