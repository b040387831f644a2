"""What an endpoint of two replicas takes while nobody asks: all processes of it and of its Ray instance.

    python -m tests.idle_benchmark

Prints one JSON object: the share of one core, in all and of each program that takes more than a thousandth.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

from rayllm.models.hub import resolve_model
from tests.e2e.endpoint import marked, start
from tests.ray.processes import processor_seconds

SETTLE_S = 20.0


def cpu_seconds(pids: Iterable[int]) -> Counter[int]:
    """Of each process."""
    seconds: Counter[int] = Counter()
    for pid in pids:
        with suppress(OSError):  # it has ended
            seconds[pid] = processor_seconds(pid)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    endpoint = start(resolve_model(arguments.model), replicas=2)
    try:
        time.sleep(SETTLE_S)
        before, started = cpu_seconds(marked(endpoint.mark)), time.monotonic()
        time.sleep(arguments.seconds)
        programs = marked(endpoint.mark)
        after, elapsed = cpu_seconds(programs), time.monotonic() - started
    finally:
        endpoint.stop()
    shares: Counter[str] = Counter()
    for pid, seconds in after.items():
        # An actor's process tells the method that it runs or ran, which changes: "ray::Actor.method".
        program = programs[pid].partition(".")[0] if programs[pid].startswith("ray::") else programs[pid]
        shares[program[:60].strip()] += (seconds - before[pid]) / elapsed
    largest = {program: share for program, share in shares.most_common() if share > 1e-3}
    print(json.dumps({"settings": vars(arguments), "share_of_a_core": shares.total(), "largest": largest}, indent=1))


if __name__ == "__main__":
    main()
