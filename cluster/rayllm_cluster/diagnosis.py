"""From what the ranks of a placement saw to what is wrong with it, each with its cause. Pure: no Ray, no sockets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_CLOCK_SKEW_S: Final = 1.0  # tokens and certificates expire by the clock, and logs are compared by it
MIN_MEMORY_BYTES: Final = 1 << 30
MIN_SHARED_MEMORY_BYTES: Final = 128 << 20  # a container's own 64 MiB is what NCCL and Ray run out of


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Of one rank. `skew_s`: its clock less the driver's, and by how much that may be wrong. `gpu`: the name of its
    device, None if it was given none. `unreachable` and `rendezvous`: what the system said, None if all was well."""

    rank: int
    node: str  # address that Ray knows it by
    interface: str | None  # that has this address
    skew_s: float
    skew_error_s: float
    free_memory_bytes: int
    shared_memory_bytes: int
    gpu_ids: tuple[str, ...]
    gpu: str | None
    gpu_problem: str | None
    unreachable: str | None  # of a port of rank 0
    rendezvous: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    rank: int
    node: str
    check: str
    problem: str | None  # None: all is well
    seen: str


def diagnose(ranks: Sequence[Facts]) -> list[Finding]:
    several_nodes = len({facts.node for facts in ranks}) > 1
    taken: dict[tuple[str, str], int] = {}
    findings = []
    for facts in ranks:
        checks = {
            "address": (_address(facts, several_nodes), f"{facts.node} on {facts.interface or 'no interface'}"),
            "port": (_port(facts, ranks[0]), f"rank 0 at {ranks[0].node}"),
            "rendezvous": (_rendezvous(facts), "torch.distributed, one sum over all ranks"),
            "clock": (_clock(facts), f"{facts.skew_s:+.3f} s (within {facts.skew_error_s:.3f} s)"),
            "memory": (_memory(facts), f"{_mib(facts.free_memory_bytes)} available"),
            "shared memory": (_shared_memory(facts), f"{_mib(facts.shared_memory_bytes)} in /dev/shm"),
            "GPU": (_gpu(facts, taken), facts.gpu or "none asked for"),
        }
        findings += [
            Finding(rank=facts.rank, node=facts.node, check=check, problem=problem, seen=seen)
            for check, (problem, seen) in checks.items()
        ]
    return findings


def _address(facts: Facts, several_nodes: bool) -> str | None:
    if several_nodes and facts.node.startswith("127.") and facts.interface == "lo":
        return f"{facts.node} is this node's loopback, which no other node can reach; start Ray with --node-ip-address"
    if facts.interface is None:
        return f"no interface of the node has {facts.node}; start Ray there with an --node-ip-address that one has"
    return None


def _port(facts: Facts, first: Facts) -> str | None:
    if facts.unreachable is None:
        return None
    return (
        f"cannot connect from {facts.node} to a port of {first.node}: {facts.unreachable}; "
        "a firewall or a network policy has to let the cluster's nodes reach each other on all ports"
    )


def _rendezvous(facts: Facts) -> str | None:
    if facts.rendezvous is None:
        return None
    if facts.unreachable is not None:
        return f"follows from the port: {facts.rendezvous}"
    return f"the ranks reach rank 0, but not each other: {facts.rendezvous}"


def _clock(facts: Facts) -> str | None:
    if abs(facts.skew_s) - facts.skew_error_s <= MAX_CLOCK_SKEW_S:
        return None
    return f"differs from the driver's by {facts.skew_s:+.1f} s; let NTP set it"


def _memory(facts: Facts) -> str | None:
    if facts.free_memory_bytes >= MIN_MEMORY_BYTES:
        return None
    return f"only {_mib(facts.free_memory_bytes)} are available, less than {_mib(MIN_MEMORY_BYTES)}"


def _shared_memory(facts: Facts) -> str | None:
    if facts.shared_memory_bytes >= MIN_SHARED_MEMORY_BYTES:
        return None
    return (
        f"/dev/shm holds {_mib(facts.shared_memory_bytes)}, less than {_mib(MIN_SHARED_MEMORY_BYTES)}; "
        "give the container more (--shm-size, or an emptyDir of medium Memory at /dev/shm)"
    )


def _gpu(facts: Facts, taken: dict[tuple[str, str], int]) -> str | None:
    if facts.gpu_problem is not None:
        return facts.gpu_problem
    for gpu in facts.gpu_ids:
        other = taken.setdefault((facts.node, gpu), facts.rank)
        if other != facts.rank:
            return f"GPU {gpu} of {facts.node} is rank {other}'s as well"
    return None


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
