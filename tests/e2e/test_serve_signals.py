"""`rayllm serve` told to stop before it is ready."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_http_grpc_ray import free_ports
from tests.ray.processes import descendants, wait_gone

pytestmark = pytest.mark.ray


def ray_starts(pids: set[int]) -> bool:
    return len(pids) >= 2


def serve_starts(pids: set[int]) -> bool:
    titles = []
    for pid in pids:
        try:
            titles.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:  # it has ended meanwhile
            continue
    return any(title.startswith(b"ray::ServeController") for title in titles)


@pytest.mark.parametrize("begun", [ray_starts, serve_starts])
def test_sigterm_before_it_is_ready_ends_it_as_ctrl_c_does(tiny_model: Path, begun: Callable[[set[int]], bool]) -> None:
    http_port, grpc_port = map(str, free_ports(2))
    rayllm = Path(sys.executable).with_name("rayllm")
    server = subprocess.Popen(
        [rayllm, "serve", tiny_model, "--http-port", http_port, "--grpc-port", grpc_port],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started: set[int] = set()
    while not begun(started):
        assert server.poll() is None
        started |= descendants(server.pid)
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    while server.poll() is None:
        started |= descendants(server.pid)
        time.sleep(0.01)
    output, errors = server.communicate()
    assert server.returncode == 130, errors
    assert output == ""
    assert "Traceback" not in errors
    assert wait_gone(started, 10) == set()
