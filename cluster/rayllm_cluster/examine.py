"""Asks every rank of a placement what it sees, as the shards of a model would see it: same bundles, same sockets."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllm_cluster.diagnosis import Facts
from rayllm_cluster.errors import PlacementError
from rayllm_cluster.interface import interface_of
from rayllm_cluster.placement import Placement, PlacementPlan, place
from rayllm_cluster.rendezvous import bind_store, connect_store, init_process_group

_CONNECT_S = 5.0
_START_S = 60.0


def examine(plan: PlacementPlan, *, timeout_s: float = 30.0) -> list[Facts]:
    """By rank. `timeout_s`: for the placement, and again for the rendezvous. Raises PlacementError."""
    placement = place(plan, timeout_s=timeout_s)
    actors: list[Any] = []
    try:
        actors = [_start(placement, slot.bundle_index) for slot in placement.slots]
        return _ask(placement, actors, timeout_s)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise PlacementError(f"a rank does not start: {str(error).strip().splitlines()[-1]}") from error
    finally:
        for actor in actors:
            ray.kill(actor)
        placement.release()


def _start(placement: Placement, bundle_index: int) -> Any:
    options = ray.remote(_Rank).options(
        num_cpus=placement.shard.get("CPU", 0),
        num_gpus=placement.shard.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement.group, placement_group_bundle_index=bundle_index
        ),
    )
    return options.remote()


def _ask(placement: Placement, actors: list[Any], timeout_s: float) -> list[Facts]:
    addresses = [slot.node.address for slot in placement.slots]
    seen = ray.get(
        [actor.look.remote(address) for actor, address in zip(actors, addresses, strict=True)], timeout=_START_S
    )
    clocks = [_clock(actor) for actor in actors]
    port = ray.get(actors[0].listen.remote(addresses[0]))
    unreachable = ray.get([actor.connect.remote(addresses[0], port) for actor in actors])
    store_port = ray.get(actors[0].bind.remote(addresses[0], len(actors), timeout_s))
    meetings = [
        actor.meet.remote(addresses[0], store_port, rank, len(actors), timeout_s) for rank, actor in enumerate(actors)
    ]
    rendezvous = ray.get(meetings, timeout=_START_S + 2 * timeout_s)
    return [
        Facts(
            rank=rank,
            node=addresses[rank],
            skew_s=clocks[rank][0],
            skew_error_s=clocks[rank][1],
            unreachable=unreachable[rank],
            rendezvous=rendezvous[rank],
            **seen[rank],
        )
        for rank in range(len(actors))
    ]


def _clock(actor: Any) -> tuple[float, float]:
    """(how much later its clock is, by how much that may be wrong): half a round trip, the quickest of three."""
    best = (0.0, float("inf"))
    for _ in range(3):
        before, started = time.time(), time.monotonic()
        there = ray.get(actor.clock.remote())
        half = (time.monotonic() - started) / 2
        if half < best[1]:
            best = (there - before - half, half)
    return best


class _Rank:
    """In the bundle of a shard."""

    def __init__(self) -> None:
        self._listening: socket.socket | None = None
        self._store: Any = None

    def look(self, address: str) -> dict[str, Any]:
        shared = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
        gpu_ids = tuple(map(str, ray.get_gpu_ids()))
        gpu, problem = _gpu(gpu_ids)
        return {
            "interface": interface_of(address),
            "free_memory_bytes": _free_memory(),
            "shared_memory_bytes": shared.f_blocks * shared.f_frsize if shared is not None else 0,
            "gpu_ids": gpu_ids,
            "gpu": gpu,
            "gpu_problem": problem,
        }

    def clock(self) -> float:
        return time.time()

    def listen(self, address: str) -> int:
        self._listening = socket.create_server((address, 0))
        port: int = self._listening.getsockname()[1]
        return port

    def connect(self, address: str, port: int) -> str | None:
        try:
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def bind(self, address: str, world_size: int, timeout_s: float) -> int:
        self._store = bind_store(address, world_size=world_size, timeout_s=timeout_s)
        port: int = self._store.port
        return port

    def meet(self, address: str, port: int, rank: int, world_size: int, timeout_s: float) -> str | None:
        import torch
        import torch.distributed as dist

        try:
            store = self._store or connect_store(address, port, world_size=world_size, timeout_s=timeout_s)
            init_process_group(store, rank=rank, world_size=world_size, backend="gloo", timeout_s=timeout_s)
            total = torch.ones(1)
            dist.all_reduce(total)
        except (RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
            return str(error).splitlines()[0]
        return None if total.item() == world_size else f"{world_size} ranks have the sum {total.item():g}"


def _gpu(gpu_ids: tuple[str, ...]) -> tuple[str | None, str | None]:
    if not gpu_ids:
        return None, None
    import torch

    if not torch.cuda.is_available():
        return None, f"Ray gave it GPU {', '.join(gpu_ids)}, but torch {torch.__version__} finds none: check the driver"
    return torch.cuda.get_device_name(0), None


def _free_memory() -> int:
    """What the machine has, or what is left of the container's limit if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
