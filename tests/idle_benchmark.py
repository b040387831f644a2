"""What an endpoint of two replicas takes while nobody asks: all processes of it and of its Ray instance.

    python -m tests.idle_benchmark

Prints one JSON object: the share of one core, in all and of each program that takes more than a thousandth.
"""

import argparse
import json
import time
from collections import Counter
from contextlib import suppress

from rayllm.models.hub import resolve_model
from tests.e2e.endpoint import marked, start
from tests.ray.processes import processor_seconds

SETTLE_S = 20.0


def cpu_seconds(mark: str) -> Counter[tuple[int, str]]:
    """Of each process of the endpoint, by its id and program."""
    seconds: Counter[tuple[int, str]] = Counter()
    for pid, command in marked(mark).items():
        with suppress(OSError):  # it has ended
            seconds[pid, command[:60]] = processor_seconds(pid)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    endpoint = start(resolve_model(arguments.model), replicas=2)
    try:
        time.sleep(SETTLE_S)
        before, started = cpu_seconds(endpoint.mark), time.monotonic()
        time.sleep(arguments.seconds)
        after, elapsed = cpu_seconds(endpoint.mark), time.monotonic() - started
    finally:
        endpoint.stop()
    shares: Counter[str] = Counter()
    for (pid, program), seconds in after.items():
        shares[program] += (seconds - before[pid, program]) / elapsed
    largest = {program: share for program, share in shares.most_common() if share > 1e-3}
    print(json.dumps({"settings": vars(arguments), "share_of_a_core": shares.total(), "largest": largest}, indent=1))


if __name__ == "__main__":
    main()
