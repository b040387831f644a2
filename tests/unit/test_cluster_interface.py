"""Where gloo listens."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from rayllm_cluster.interface import LOOPBACK, interface_of, listen_towards


def test_interfaces_are_found_by_their_addresses() -> None:
    assert interface_of(LOOPBACK) == "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            pytest.skip("this machine has no way out")
        address = probe.getsockname()[0]
    (name,) = [name for name, has in psutil.net_if_addrs().items() if any(each.address == address for each in has)]
    assert interface_of(address) == name
    assert interface_of("198.51.100.1") is None


@pytest.mark.parametrize(("host", "chosen"), [(LOOPBACK, "lo"), ("no.host.invalid", None), ("::1", None)])
def test_what_leads_to_a_host(host: str, chosen: str | None) -> None:
    script = "import os, sys; from rayllm_cluster.interface import listen_towards; listen_towards(sys.argv[1]); "
    script += "print(os.environ.get('GLOO_SOCKET_IFNAME'))"
    environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
    run = subprocess.run([sys.executable, "-c", script, host], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str(chosen), run.stderr


def test_the_users_choice_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    listen_towards(LOOPBACK)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
