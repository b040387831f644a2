"""Load takes an endpoint from one replica to three and back, and to none; every request is answered."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.replicas import Replicas, ask, running
from tests.ray.processes import descendants

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKENS = 60
CLIENTS = 16  # of each face; a replica runs 4 requests at once


def num_replicas(endpoint: Replicas) -> int:
    """Counted from outside: a request would wake an endpoint that sleeps."""
    count = 0
    for pid in descendants(endpoint.process.pid):
        with suppress(OSError):
            count += "ServeReplica:rayllm:inference" in Path(f"/proc/{pid}/cmdline").read_text()
    return count


def wait_until(condition: Callable[[], bool], within_s: float) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < within_s, f"not within {within_s:g} s"
        time.sleep(0.2)
    return time.monotonic() - start


@contextmanager
def load(endpoint: Replicas) -> Iterator[list[int]]:
    """Yields the lengths of the answers so far. Raises what any request raised."""
    ended = threading.Event()
    lengths: list[int] = []

    def http(i: int) -> None:
        while not ended.is_set():
            lengths.append(ask(endpoint.url, f"http {i}", max_tokens=TOKENS)["usage"]["completion_tokens"])

    def grpc(i: int) -> None:
        request = pb.GenerateRequest(model="tiny", text=f"grpc {i}")
        request.sampling.max_tokens = TOKENS
        request.sampling.ignore_eos = True
        with endpoint.channel() as channel:
            while not ended.is_set():
                chunks = InferenceStub(channel).GenerateStream(request)
                lengths.append(sum(len(chunk.token_ids) for chunk in chunks))

    with ThreadPoolExecutor(2 * CLIENTS) as pool:
        clients = [pool.submit(work, i) for work in (http, grpc) for i in range(CLIENTS)]
        try:
            yield lengths
        finally:
            ended.set()
        for client in clients:
            client.result()


def test_one_to_three_to_one_to_none_and_back(tiny_model):
    sections = {
        "model": {"model": str(tiny_model)},
        "cache": {"num_blocks": 200},
        "scheduler": {"max_num_seqs": 4},
        "serve": {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": 1.0, "downscale_delay_s": 10.0},
    }
    with running(sections) as endpoint:
        assert num_replicas(endpoint) == 1
        with load(endpoint) as lengths:
            up_s = wait_until(lambda: num_replicas(endpoint) == 3, 60)
            time.sleep(10)
        answered = len(lengths)
        assert set(lengths) == {TOKENS}
        # A trickle goes on through the way down: nothing of it is lost either.
        start = time.monotonic()
        while num_replicas(endpoint) > 1:
            assert time.monotonic() - start < 90, "one replica is enough for one request at a time"
            assert ask(endpoint.url, "trickle", max_tokens=TOKENS)["usage"]["completion_tokens"] == TOKENS
            time.sleep(0.1)
        down_s = time.monotonic() - start
        zero_s = wait_until(lambda: num_replicas(endpoint) == 0, 90)
        start = time.monotonic()
        assert ask(endpoint.url, "wake up")["usage"]["completion_tokens"] == 4
        wake_s = time.monotonic() - start
        times = f"to 3: {up_s:.1f} s, to 1: {down_s:.1f} s, to 0: {zero_s:.1f} s, awake: {wake_s:.1f} s"
        print(f"{answered} answers; {times}")
