"""What routing by prefix is worth: three pairs of replicas, side by side, under the same load in turns.

    python -m tests.routing_benchmark                     # caches that hold every document
    python -m tests.routing_benchmark --num-blocks 300    # that hold two thirds of them

Each replica is a process with both faces and no Ray (`routed_replica`), and what the proxy does, a choice at random, is
done here. Clients ask several questions on each of a few documents, by HTTP and gRPC in turns. Rounds take turns
between the policies: the choice at random alone, the less loaded of two, the prefix. Then what a hop costs (a request
that is answered by the other replica than the one it came to, against one that stays) and what replicas take while
nobody asks. Prints one JSON object; everything runs on this machine, whose load it tells.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from rayllm.client import AsyncClient
from rayllm.core.types import SamplingParams
from rayllm.serve.routing import Candidate, decide
from tests.e2e.conftest import MODEL
from tests.ray.processes import processor_seconds

POLICIES = {"random": "none", "power-of-two": "power-of-two", "prefix": "prefix"}
NAMES = ("a", "b")
DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 512, 24, 8
ACQUAINTED_S = 5.0
IDLE_S = 20.0


@dataclass(frozen=True)
class Replica:
    process: subprocess.Popen[str]
    url: str
    grpc: str


Pair = dict[str, Replica]


@contextmanager
def running(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Pair]]:
    """A pair for each policy; all start at once."""
    processes = {(label, name): _start(label, name, arguments, folder) for label in POLICIES for name in NAMES}
    try:
        pairs: dict[str, Pair] = {label: {} for label in POLICIES}
        for (label, name), process in processes.items():
            assert process.stdout is not None
            pairs[label][name] = Replica(process, **json.loads(process.stdout.readline()))
        yield pairs
    finally:
        for process in processes.values():
            process.communicate(timeout=60)


def _start(label: str, name: str, arguments: argparse.Namespace, folder: Path) -> subprocess.Popen[str]:
    (folder / label).mkdir(exist_ok=True)
    settings = {
        "name": name,
        "model": arguments.model,
        "folder": str(folder / label),
        "key": "00" * 32,
        "policy": POLICIES[label],
        "num_blocks": arguments.num_blocks,
    }
    command = [sys.executable, "-m", "tests.routed_replica", json.dumps(settings)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def load(seed: int, documents: int, questions: int) -> list[list[int]]:
    rng = random.Random(seed)
    texts = [[rng.randrange(100, 40000) for _ in range(DOCUMENT_TOKENS)] for _ in range(documents)]
    prompts = [text + [rng.randrange(100, 40000) for _ in range(QUESTION_TOKENS)] for text in texts * questions]
    rng.shuffle(prompts)
    return prompts


async def ask_http(client: httpx.AsyncClient, url: str, prompt: list[int], session: str | None = None) -> float:
    """Seconds to the first token."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "prompt_cache_key": session,
    }
    first, started = 0.0, time.perf_counter()
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                assert "error" not in json.loads(line[6:]), line
                first = first or time.perf_counter() - started
    return first


async def ask_grpc(client: AsyncClient, prompt: list[int]) -> float:
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    first, started = 0.0, time.perf_counter()
    async for _ in client.stream(prompt, params, model=MODEL):
        first = first or time.perf_counter() - started
    return first


async def one_round(pair: Pair, prompts: list[list[int]], concurrency: int, seed: int) -> tuple[list[float], float]:
    """Seconds to the first token of each, and how long all took."""
    rng, seconds = random.Random(seed), []
    waiting = iter([(i, rng.choice(NAMES), prompt) for i, prompt in enumerate(prompts)])
    started = time.perf_counter()
    async with (
        httpx.AsyncClient(timeout=300) as http,
        AsyncClient(pair["a"].grpc) as a,
        AsyncClient(pair["b"].grpc) as b,
    ):
        grpc = {"a": a, "b": b}

        async def client() -> None:
            for i, name, prompt in waiting:
                asked = ask_grpc(grpc[name], prompt) if i % 2 else ask_http(http, pair[name].url, prompt)
                seconds.append(await asked)

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return seconds, time.perf_counter() - started


def counters(pair: Pair) -> dict[str, float]:
    """Of both replicas, summed over their labels."""
    totals: dict[str, float] = {}
    for replica in pair.values():
        text = httpx.get(f"{replica.url}/metrics", timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
                    if sample.labels.get("target") == "peer":
                        totals["sent_on"] = totals.get("sent_on", 0.0) + sample.value
    return totals


async def hop(pair: Pair, requests: int) -> dict[str, float]:
    """Milliseconds to the first token of short prompts, one at a time: those that stay where they came in, and those
    that are sent on."""
    candidates = [Candidate(name=name) for name in NAMES]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    rng = random.Random(5)
    async with httpx.AsyncClient(timeout=300) as http:
        for i in range(requests):
            session = str(i)
            owner = decide(candidates, local="", policy="prefix", prompt_tokens=16, session=session, rng=rng).replica
            for name in rng.sample(NAMES, 2):
                prompt = [rng.randrange(100, 40000) for _ in range(16)]
                took = await ask_http(http, pair[name].url, prompt, session)
                if i >= 5:  # the first open connections
                    seconds[name == owner].append(took)
    local, forwarded = (1e3 * median(seconds[is_local]) for is_local in (True, False))
    fastest = 1e3 * (min(seconds[False]) - min(seconds[True]))
    return {
        "local_ttft_ms": local,
        "forwarded_ttft_ms": forwarded,
        "hop_ms": forwarded - local,
        "hop_ms_of_minima": fastest,
    }


def cpu_seconds(pair: Pair) -> float:
    return sum(processor_seconds(replica.process.pid) for replica in pair.values())


def idle(pairs: dict[str, Pair]) -> dict[str, float]:
    """Share of one core that each pair takes."""
    before = {name: cpu_seconds(pair) for name, pair in pairs.items()}
    started = time.monotonic()
    time.sleep(IDLE_S)
    elapsed = time.monotonic() - started
    return {name: (cpu_seconds(pair) - before[name]) / elapsed for name, pair in pairs.items()}


def measure(pairs: dict[str, Pair], arguments: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    medians: dict[str, list[float]] = {name: [] for name in pairs}
    durations: dict[str, float] = dict.fromkeys(pairs, 0.0)
    for pair in pairs.values():  # compiled and warm; not counted
        asyncio.run(one_round(pair, load(-1, 2, 2), 2, 0))
    before = {name: counters(pair) for name, pair in pairs.items()}
    orders = itertools.cycle(itertools.permutations(pairs))
    for i in range(arguments.rounds):
        for name in next(orders):
            prompts = load(i, arguments.documents, arguments.questions)
            took, duration = asyncio.run(one_round(pairs[name], prompts, arguments.concurrency, i))
            seconds[name] += took
            medians[name].append(1e3 * median(took))
            durations[name] += duration
    for name, pair in pairs.items():
        now = counters(pair)
        hits, queries = (
            now[each] - before[name][each]
            for each in ("rayllm_prefix_hit_tokens_total", "rayllm_prefix_query_tokens_total")
        )
        report[name] = {
            "ttft_p50_ms": 1e3 * median(seconds[name]),
            "ttft_p90_ms": 1e3 * quantiles(seconds[name], n=10)[-1],
            "ttft_p50_ms_by_round": medians[name],
            "requests_per_s": len(seconds[name]) / durations[name],
            "prefix_hits": hits / queries,
            "sent_on": (now.get("sent_on", 0.0) - before[name].get("sent_on", 0.0)) / len(seconds[name]),
        }
    report["random_over_prefix"] = report["random"]["ttft_p50_ms"] / report["prefix"]["ttft_p50_ms"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--questions", type=int, default=4, help="on each document")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--num-blocks", type=int, default=600, help="of 16 tokens, of each replica's cache")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"settings": vars(arguments), "cores": os.cpu_count(), "load_before": os.getloadavg()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        pairs = stack.enter_context(running(arguments, folder))
        time.sleep(ACQUAINTED_S)
        report |= measure(pairs, arguments)
        report["hop"] = asyncio.run(hop(pairs["prefix"], 60))
        report["load_after"] = os.getloadavg()
        report["idle_share_of_a_core"] = idle(pairs)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
