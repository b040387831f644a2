"""What a session starts, it ends, whatever ends the session."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import ray

from rayllm_cluster.errors import SessionError
from rayllm_cluster.session import Session
from tests.ray.processes import descendants, wait_gone

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]

DRIVER = textwrap.dedent("""
    import sys, time
    from rayllm_cluster.session import Session

    with Session.start(num_cpus=4):
        from rayllm_cluster.placement import plan_placement
        from rayllm_cluster.shard_group import ShardGroup

        with ShardGroup("tests.ray.shards:create_echo", b"", plan_placement(2, 1, shard={"CPU": 1.0})) as group:
            group.start(timeout_s=60)
            group.broadcast(b"step x", timeout_s=10)
            print(group.recv(1, timeout_s=10).decode(), flush=True)
            group.recv(0, timeout_s=600)
""")


def test_no_process_is_left_after_stop() -> None:
    before = descendants(os.getpid())
    session = Session.start()
    started = descendants(os.getpid()) - before
    assert started
    assert not Session.start()._owned, "a Ray that is there is joined"
    session.stop()
    session.stop()
    assert not ray.is_initialized()
    assert wait_gone(started, 5) == set()


def test_joining_does_not_own() -> None:
    with Session.start():
        Session.start().stop()
        assert ray.is_initialized()
    assert not ray.is_initialized()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_after_a_signal(number: signal.Signals) -> None:
    """SIGINT as a terminal sends it: to the driver and every process of its group."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "x\n"
    started = descendants(driver.pid)
    shards = {pid for pid in started if b"Shard" in Path(f"/proc/{pid}/cmdline").read_bytes()}
    assert len(shards) == 2
    if number is signal.SIGINT:
        os.killpg(driver.pid, number)
    else:
        driver.send_signal(number)
    _, errors = driver.communicate(timeout=30)
    # After SIGKILL Ray's own agents outlive their raylet by a minute; the shards must not.
    assert wait_gone(shards if number is signal.SIGKILL else started, 10) == set()
    if number is signal.SIGINT:
        assert errors.splitlines()[-1] == "KeyboardInterrupt"


STARTING = "from rayllm_cluster.session import Session\nprint('x', flush=True)\nSession.start()\nprint('y', flush=True)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left_after_a_signal_while_ray_starts(number: signal.Signals) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", STARTING],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "x\n"
    started: set[int] = set()
    while len(started) < 2:  # Ray is in the middle of it
        assert driver.poll() is None
        started |= descendants(driver.pid)
        time.sleep(0.01)
    driver.send_signal(number)
    while driver.poll() is None:
        started |= descendants(driver.pid)
        time.sleep(0.01)
    assert driver.stdout.read() == ""
    driver.communicate()
    assert driver.returncode != 0
    assert wait_gone(started, 10) == set()


RAY_IS_SHUT_DOWN = textwrap.dedent("""
    import ray
    from rayllm_cluster.session import Session
    from rayllm_cluster.placement import plan_placement
    from rayllm_cluster.shard_group import ShardGroup

    session = Session.start(num_cpus=4)
    group = ShardGroup("tests.ray.shards:create_echo", b"", plan_placement(1, 1, shard={"CPU": 1.0}))
    group.start(timeout_s=60)
    ray.shutdown()
    group.close()
    session.stop()
    print(ray.is_initialized())
""")


def test_a_group_may_be_closed_after_ray_is_shut_down() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RAY_IS_SHUT_DOWN], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_an_address_where_nothing_is() -> None:
    with pytest.raises(SessionError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:1: .*refused"):
        Session.start(address="127.0.0.1:1")
    assert not ray.is_initialized()


def test_a_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(*args: object, **settings: object) -> None:
        raise Exception("The current node timed out during startup. This could")

    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(SessionError, match="cannot start Ray on this machine: The current node timed out during"):
        Session.start()
