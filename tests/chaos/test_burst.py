"""Ten times as many requests as an endpoint can answer, for half a minute: what it takes it answers nearly as fast as
before, the rest it refuses at once, and it does not grow."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest

from tests.chaos.conftest import Row
from tests.chaos.load import Seen
from tests.e2e.endpoint import Endpoint, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLACES = 8
WAITING = 4  # who is taken last waits for half of an answer's time
BEFORE_S, BURST_S, TIMES = 8.0, 30.0, 10
MOST_GROWTH_BYTES = 32 << 20


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path) -> Iterator[Endpoint]:
    endpoint = start(tiny_model, max_num_seqs=PLACES, max_waiting=WAITING)
    yield endpoint
    endpoint.stop()


async def said_by(module: str, *arguments: object) -> Any:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *map(str, arguments)), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(said)


def resident_bytes(endpoint: Endpoint) -> dict[str, int]:
    """Of each process that a request passes through."""
    sizes = {}
    for title in ("ray::ServeReplica", "bin/haproxy", "ray::HAProxyManager"):
        (pid,) = endpoint.named(title)
        sizes[title] = 4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return sizes


async def test_ten_times_the_load(endpoint: Endpoint, report: list[Row]) -> None:
    url = endpoint.http.base_url
    faces = (url, endpoint.grpc_address)
    before = Seen(**await said_by("tests.chaos.load", *faces, "clients", PLACES, BEFORE_S))
    assert not before.refused_s
    rate = TIMES * len(before.answered_s) / before.seconds
    sizes = resident_bytes(endpoint)

    told, seen_beside = await asyncio.gather(
        said_by("tests.chaos.load", *faces, "rate", rate, BURST_S),
        said_by("tests.chaos.refusals", url.host, url.port, BURST_S - 2),
    )
    burst = Seen(**told)
    grown = {title: size - sizes[title] for title, size in resident_bytes(endpoint).items()}
    assert burst.count == round(rate * BURST_S)
    assert len(burst.refused_s) > len(burst.answered_s) > PLACES
    assert len(seen_beside) > 100
    assert max(grown.values()) < MOST_GROWTH_BYTES, grown
    endpoint.settled()
    report.append(
        Row(
            fault=f"{burst.count / burst.seconds / rate * TIMES:.1f} times the load for {burst.seconds:.0f} s",
            detection_s=seen_beside,
            recovery_s=[],
            leaks=[],
            measured=f"{len(burst.answered_s)} answered in {median(burst.answered_s):.2f} s (p50; before the burst "
            f"{median(before.answered_s):.2f}), {len(burst.refused_s)} refused, which the load generator saw after "
            f"{quantiles(burst.refused_s, n=100)[-1]:.3f} s (99 of 100) and {max(burst.refused_s):.3f} (all); "
            f"the most that a process grew: {max(grown.values()) / 2**20:.1f} MiB",
        )
    )
