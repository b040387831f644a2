"""Each cause by its name."""

import re
from dataclasses import replace

import pytest

from rayllm_cluster.diagnosis import Facts, diagnose

WELL = Facts(
    rank=0,
    node="10.0.0.1",
    interface="eth0",
    skew_s=0.01,
    skew_error_s=0.005,
    free_memory_bytes=8 << 30,
    shared_memory_bytes=8 << 30,
    gpu_ids=("0",),
    gpu="H100",
    gpu_problem=None,
    unreachable=None,
    rendezvous=None,
)
OTHER = replace(WELL, rank=1, node="10.0.0.2")


def problems(*ranks: Facts) -> dict[tuple[int, str], str]:
    return {(each.rank, each.check): each.problem for each in diagnose(ranks) if each.problem is not None}


def test_nothing_is_wrong():
    findings = diagnose([WELL, OTHER])
    assert len(findings) == 2 * 7
    assert problems(WELL, OTHER) == {}


@pytest.mark.parametrize(
    ("change", "check", "cause"),
    [
        ({"skew_s": -3.0}, "clock", r"-3\.0 s; let NTP"),
        ({"free_memory_bytes": 500 << 20}, "memory", "only 500 MiB"),
        ({"shared_memory_bytes": 64 << 20}, "shared memory", "64 MiB.*--shm-size"),
        ({"interface": None}, "address", "no interface"),
        ({"node": "127.0.0.1", "interface": "lo"}, "address", "loopback"),
        (
            {"unreachable": "Connection refused"},
            "port",
            r"from 10\.0\.0\.2 to a port of 10\.0\.0\.1: Connection refused",
        ),
        ({"rendezvous": "timed out"}, "rendezvous", "not each other: timed out"),
        ({"gpu_problem": "torch finds none"}, "GPU", "finds none"),
    ],
)
def test_one_cause(change, check, cause):
    found = problems(WELL, replace(OTHER, **change))
    assert found.keys() == {(1, check)}
    assert re.search(cause, found[1, check])


def test_a_slow_answer_is_no_wrong_clock():
    assert problems(WELL, replace(OTHER, skew_s=2.0, skew_error_s=1.5)) == {}


def test_one_node_may_be_loopback_and_a_gpu_is_given_once():
    local = replace(WELL, node="127.0.0.1", interface="lo")
    assert problems(local, replace(local, rank=1, gpu_ids=("1",))) == {}
    assert problems(WELL, replace(WELL, rank=1)) == {(1, "GPU"): "GPU 0 of 10.0.0.1 is rank 0's as well"}


def test_what_follows_from_a_closed_port_says_so():
    found = problems(WELL, replace(OTHER, unreachable="No route to host", rendezvous="timed out"))
    assert found[1, "rendezvous"] == "follows from the port: timed out"
