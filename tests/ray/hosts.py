"""Two machines in one: network namespaces with an address each, joined by a cable, and a Ray node in either."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_PREFIX: Final = "198.18.73"  # of the block for tests of network devices (RFC 2544)
_PORT: Final = 6379  # each namespace has all ports of its own


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str
    environment: dict[str, str] = field(default_factory=lambda: {"RAY_AUTH_MODE": "disabled"})

    def popen(self, *command: str | Path, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            text=True,
            env=os.environ | self.environment,
            **options,  # type: ignore[call-overload]
        )

    def python(self, script: str, *arguments: object, timeout_s: float = 240) -> str:
        """-> what it printed. Raises AssertionError with what it said if it failed."""
        process = self.popen(
            sys.executable, "-c", script, *map(str, arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            said, complained = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert process.returncode == 0, complained
        return said


def why_not() -> str | None:
    """Why this machine has no network namespaces for us; None: it has."""
    name = f"rayllm-{os.getpid()}-try"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no `ip` (Debian: iproute2)"
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@contextmanager
def two_hosts(*, num_cpus: int) -> Iterator[tuple[Host, Host]]:
    """Each a node of the Ray cluster that the first one heads, at `cluster_address`."""
    hosts = tuple(Host(f"rayllm-{os.getpid()}-{n}", f"{_PREFIX}.{n + 1}") for n in range(2))
    first, second = hosts
    with ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
        cable = [f"rl{os.getpid()}a", f"rl{os.getpid()}b"]
        _ip(
            "link",
            "add",
            cable[0],
            "netns",
            first.namespace,
            "type",
            "veth",
            "peer",
            cable[1],
            "netns",
            second.namespace,
        )
        for host, end in zip(hosts, cable, strict=True):
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", end)
            for link in ("lo", end):
                _ip("-n", host.namespace, "link", "set", link, "up")
        ray = Path(sys.executable).with_name("ray")
        node = ["--num-cpus", str(num_cpus), "--object-store-memory", str(80 << 20), "--disable-usage-stats", "--block"]
        for host, role in (
            (first, ["--head", "--port", str(_PORT), "--include-dashboard", "false"]),
            (second, ["--address", cluster_address(first)]),
        ):
            started = host.popen(
                ray, "start", *role, "--node-ip-address", host.address, *node, stdout=subprocess.DEVNULL
            )
            stack.callback(started.wait, timeout=60)
            stack.callback(started.terminate)
            if host is first:
                _wait_for(host, 1)
        _wait_for(first, 2)
        yield first, second


def cluster_address(head: Host) -> str:
    return f"{head.address}:{_PORT}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _wait_for(head: Host, nodes: int) -> None:
    script = """
import sys
from ray._raylet import GcsClient
alive = [node for node in GcsClient(address=sys.argv[1]).get_all_node_info().values() if node.state == 0]
sys.exit(len(alive) < int(sys.argv[2]))
"""
    give_up = time.monotonic() + 120
    while True:
        asked = head.popen(sys.executable, "-c", script, cluster_address(head), str(nodes), stderr=subprocess.PIPE)
        _, complained = asked.communicate(timeout=60)
        if asked.returncode == 0:
            return
        assert time.monotonic() < give_up, complained
        time.sleep(0.5)
