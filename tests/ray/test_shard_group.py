"""Groups of real actors: what they answer, and how they end."""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from rayllm_cluster.errors import GroupClosedError, PlacementError, ShardLostError, ShardStalledError
from rayllm_cluster.hub import DIED
from rayllm_cluster.members import STOPPED
from rayllm_cluster.placement import plan_placement
from rayllm_cluster.session import Session
from rayllm_cluster.shard_group import GroupOptions, ShardGroup
from tests.ray.processes import wait_gone

pytestmark = pytest.mark.ray

ECHO = "tests.ray.shards:create_echo"


@pytest.fixture(autouse=True)
def nothing_is_left(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test: no placement group, no actor, no socket, no file, no thread."""
    short = Path(tempfile.mkdtemp(dir="/tmp"))  # a path of AF_UNIX is at most 107 bytes
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    open_files = len(os.listdir("/proc/self/fd"))
    yield
    assert list(short.iterdir()) == []
    short.rmdir()
    assert not [thread for thread in threading.enumerate() if thread.name == "shard-watcher"]
    assert len(os.listdir("/proc/self/fd")) <= open_files + 2
    deadline = time.monotonic() + 5
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "the bundles are not given back"
        time.sleep(0.02)


def start(
    tensor: int, pipeline: int = 1, factory: str = ECHO, start_timeout_s: float = 60, **options: float
) -> ShardGroup:
    plan = plan_placement(tensor, pipeline, shard={"CPU": 1.0})
    group = ShardGroup(factory, b"config", plan, GroupOptions(**options))
    try:
        group.start(timeout_s=start_timeout_s)
    except BaseException:
        group.close()
        raise
    return group


def pids(group: ShardGroup) -> set[int]:
    return {json.loads(ready)["pid"] for ready in group.ready}


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
def test_echo_and_all_reduce(tensor: int, pipeline: int) -> None:
    world_size = tensor * pipeline
    with start(tensor, pipeline, threads=2) as group:
        ready = [json.loads(payload) for payload in group.ready]
        assert [about["rank"] for about in ready] == list(range(world_size))
        assert {about["config"] for about in ready} == {"config"}
        assert {about["threads"] for about in ready} == {2}
        assert len(pids(group)) == world_size
        for size in (0, 1, 5000, 3_000_000):
            payload = os.urandom(size)
            group.broadcast(b"step " + payload, timeout_s=10)
            group.broadcast(b"step " + payload, timeout_s=10)
            assert group.recv(world_size - 1, timeout_s=10) == payload
            assert group.recv(world_size - 1, timeout_s=10) == payload
        if world_size > 1:
            group.broadcast(b"reduce 0.5", timeout_s=10)
            total = 0.5 * world_size * (world_size + 1) / 2
            assert [float(group.recv(rank, timeout_s=10)) for rank in range(world_size)] == [total] * world_size
        processes = pids(group)
        group.close()
        group.close()
        assert wait_gone(processes, 0) == set()
        with pytest.raises(GroupClosedError):
            group.broadcast(b"step x", timeout_s=1)


def lose(group: ShardGroup, command: bytes, *, wait_for: int, timeout_s: float = 20) -> ShardLostError:
    group.broadcast(command, timeout_s=5)
    with pytest.raises(ShardLostError) as caught:
        group.recv(wait_for, timeout_s=timeout_s)
    return caught.value


@pytest.mark.parametrize("command", [b"kill-in-collective 1", b"exit 1"])
def test_a_shard_that_dies_ends_the_group(command: bytes) -> None:
    with start(2) as group:
        processes = pids(group)
        before = time.monotonic()
        lost = lose(group, command, wait_for=0)
        assert time.monotonic() - before < 2
        assert (lost.rank, lost.cause) == (1, DIED)
        assert wait_gone(processes, 0) == set()
        for _ in range(2):
            with pytest.raises(ShardLostError, match=f"shard 1: {DIED}"):
                group.broadcast(b"step x", timeout_s=1)


def test_a_death_from_outside_while_nothing_is_asked() -> None:
    with start(2) as group:
        processes = pids(group)
        os.kill(json.loads(group.ready[0])["pid"], signal.SIGKILL)
        assert wait_gone(processes, 2) == set()
        with pytest.raises(ShardLostError, match=f"shard 0: {DIED}"):
            group.recv(1, timeout_s=1)


def test_a_shard_that_stalls_meets_the_deadline() -> None:
    with start(2) as group:
        processes = pids(group)
        before = time.monotonic()
        lost = lose(group, b"sleep 1", wait_for=1, timeout_s=0.5)
        assert time.monotonic() - before < 2.5
        assert isinstance(lost, ShardStalledError)
        assert (lost.rank, lost.cause) == (1, "no answer within 0.5 s")
        assert 0.5 <= lost.detection_s < 1
        assert wait_gone(processes, 0) == set()


def test_a_shard_that_is_stopped_is_found_long_before_the_deadline() -> None:
    with start(2) as group:
        processes = pids(group)
        before = time.monotonic()
        lost = lose(group, b"stop-in-collective 1", wait_for=0, timeout_s=60)
        assert time.monotonic() - before < 2 + 0.5  # the latter: for it to be killed
        assert (lost.rank, lost.cause) == (1, STOPPED)
        assert lost.detection_s < 2
        assert wait_gone(processes, 0) == set()


def test_a_shard_that_is_stopped_while_nothing_is_asked() -> None:
    with start(2) as group:
        processes = pids(group)
        os.kill(json.loads(group.ready[0])["pid"], signal.SIGSTOP)
        assert wait_gone(processes, 2 + 0.5) == set()
        with pytest.raises(ShardLostError, match=f"shard 0: {STOPPED}"):
            group.check()


def test_a_shard_that_is_busy_or_held_for_a_moment_is_not_lost() -> None:
    """As by a profiler. A busy one holds the interpreter for longer than a stopped one would be left alone."""
    with start(2) as group:
        about = json.loads(group.ready[0])
        os.kill(about["pid"], signal.SIGSTOP)
        time.sleep(0.1)
        os.kill(about["pid"], signal.SIGCONT)
        group.broadcast(b"hold 3", timeout_s=5)
        assert group.recv(0, timeout_s=30) == b"held"
        group.check()


def test_a_lost_group_starts_again_in_the_same_placement() -> None:
    with start(2) as group:
        lives = [pids(group)]
        for rank in (0, 1):
            lose(group, b"kill-in-collective %d" % rank, wait_for=1 - rank)
            with pytest.raises(ShardLostError):
                group.check()
            group.start(timeout_s=60)
            group.check()
            lives.append(pids(group))
            group.broadcast(b"reduce 1", timeout_s=10)
            assert [group.recv(rank, timeout_s=10) for rank in (0, 1)] == [b"3.0", b"3.0"]
        assert len(set().union(*lives)) == 6
        assert len([row for row in ray.util.placement_group_table().values() if row["state"] == "CREATED"]) == 1


def test_close_ends_a_start_from_another_thread() -> None:
    group = ShardGroup("tests.ray.shards:create_slowly", b"", plan_placement(2, 1, shard={"CPU": 1.0}))
    closer = threading.Timer(3, group.close)
    closer.start()
    with pytest.raises(GroupClosedError):
        group.start(timeout_s=300)
    closer.join()
    with pytest.raises(GroupClosedError):
        group.start(timeout_s=300)


def test_a_handler_that_raises_is_named() -> None:
    with start(2) as group:
        processes = pids(group)
        lost = lose(group, b"raise-in-collective 1", wait_for=0)
        assert str(lost) == "shard 1: ValueError: the page table is torn"
        assert lost.error == ("ValueError", "the page table is torn")
        assert wait_gone(processes, 0) == set()


def test_a_handler_that_cannot_be_built_says_why() -> None:
    with pytest.raises(ShardLostError) as caught:
        start(3, factory="tests.ray.shards:create_broken")
    assert caught.value.rank == 2
    assert caught.value.error == ("CheckpointError", "model.safetensors: truncated")


def test_a_handler_that_does_not_exist() -> None:
    with pytest.raises(ShardLostError) as caught:
        start(1, factory="tests.ray.shards:create_nothing")
    assert caught.value.error is not None
    assert caught.value.error.type == "AttributeError"


def test_a_shard_that_is_never_ready() -> None:
    before = time.monotonic()
    with pytest.raises(ShardStalledError, match="shard 1: no sign of being ready within"):
        start(2, factory="tests.ray.shards:create_slowly", start_timeout_s=8)
    assert time.monotonic() - before < 12


def test_a_function_is_a_factory_too() -> None:
    class Reverse:
        def ready(self) -> bytes:
            return b""

        def handle(self, payload: bytes) -> bytes:
            return payload[::-1]

    with ShardGroup(lambda *_: Reverse(), b"", plan_placement(1, 1, shard={"CPU": 1.0})) as group:
        group.start(timeout_s=60)
        group.broadcast(b"abc", timeout_s=5)
        assert group.recv(0, timeout_s=5) == b"cba"


def test_close_from_another_thread_ends_a_blocked_call() -> None:
    group = start(1)
    closer = threading.Timer(0.2, group.close)
    closer.start()
    with pytest.raises(GroupClosedError):
        group.recv(0, timeout_s=60)
    closer.join()


def test_a_cluster_that_is_too_small_is_no_reason_to_wait() -> None:
    before = time.monotonic()
    with pytest.raises(PlacementError, match=r"need 999 CPU on one node; the cluster has \d+ CPU"):
        start(999)
    with pytest.raises(PlacementError, match=r"need 2 times 1 CPU, 1 GPU; the cluster has \d+ CPU, 0 GPU"):
        ShardGroup(ECHO, b"", plan_placement(1, 2, shard={"CPU": 1.0, "GPU": 1.0}))
    assert time.monotonic() - before < 5


def test_a_cluster_that_is_full_is_waited_for() -> None:
    num_cpus = int(ray.cluster_resources()["CPU"])
    with (
        start(1),
        pytest.raises(PlacementError, match=rf"no room for {num_cpus} times 1 CPU within 0\.2 s; {num_cpus - 1} CPU"),
    ):
        start(num_cpus, placement_timeout_s=0.2)


class Replica:
    """Drives a group from inside a placement group, as a Serve replica does."""

    def total(self, tensor: int) -> str:
        with start(tensor) as group:
            group.broadcast(b"reduce 1", timeout_s=10)
            return group.recv(tensor - 1, timeout_s=10).decode()


def in_replica(tensor: int, bundles: list[dict[str, float]]) -> Callable[[], str]:
    group = ray.util.placement_group(bundles, strategy="STRICT_PACK")
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    replica = ray.remote(Replica).options(num_cpus=1, scheduling_strategy=strategy).remote()

    def call() -> str:
        try:
            return str(ray.get(replica.total.remote(tensor), timeout=60))
        finally:
            ray.kill(replica)
            ray.util.remove_placement_group(group)

    return call


def test_inside_a_replica_its_own_bundles_are_taken() -> None:
    plan = plan_placement(2, 1, shard={"CPU": 1.0})
    assert in_replica(2, [dict(bundle) for bundle in plan.bundles])() == "3.0"


def test_inside_a_replica_the_bundles_have_to_match() -> None:
    with pytest.raises(PlacementError, match="placement group of 2 bundles; 3 shards need 4"):
        in_replica(3, [{"CPU": 1.0}] * 2)()


def test_step_latency(capsys: pytest.CaptureFixture[str]) -> None:
    """Reported, not judged: the machine is shared."""
    report = []
    for tensor in (2, 4):
        with start(tensor) as group:
            times = []
            for _ in range(1000):
                before = time.perf_counter()
                group.broadcast(b"step " + bytes(2048), timeout_s=10)
                group.recv(tensor - 1, timeout_s=10)
                times.append(1e6 * (time.perf_counter() - before))
        times.sort()
        report.append(f"{tensor} shards: p50 {times[500]:.0f} us, p90 {times[900]:.0f} us")
    with capsys.disabled():
        print("\n" + "; ".join(report))
