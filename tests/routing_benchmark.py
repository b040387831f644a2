"""What routing by prefix is worth: three endpoints of two replicas each, side by side, under the same load in turns.

    python -m tests.routing_benchmark                     # caches that hold every document
    python -m tests.routing_benchmark --num-blocks 300    # that hold two thirds of them

Clients ask several questions on each of a few documents, by HTTP and gRPC in turns. Rounds take turns between the
policies: the proxy's random choice, the less loaded of two, the prefix. Then what a hop costs (a request that is sent
to one replica and answered by the other, against one that stays) and what the endpoints take while nobody asks.
Prints one JSON object; everything runs on this machine, whose load it tells.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from rayllm.client import AsyncClient
from rayllm.core.types import SamplingParams
from rayllm.serve.routing import Candidate, decide
from tests.e2e.replicas import Replicas, running
from tests.ray.processes import descendants

POLICIES = {
    "random": ("none", {"RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "random"}),
    "power-of-two": ("power-of-two", {}),
    "prefix": ("prefix", {}),
}
DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 512, 24, 8
ACQUAINTED_S = 6.0
IDLE_S = 30.0
FIRST_PORT = 30000  # where Serve's replicas listen for HTTP


def load(seed: int, documents: int, questions: int) -> list[list[int]]:
    rng = random.Random(seed)
    texts = [[rng.randrange(100, 40000) for _ in range(DOCUMENT_TOKENS)] for _ in range(documents)]
    prompts = [text + [rng.randrange(100, 40000) for _ in range(QUESTION_TOKENS)] for text in texts * questions]
    rng.shuffle(prompts)
    return prompts


async def ask_http(
    endpoint: Replicas, prompt: list[int], *, url: str | None = None, session: str | None = None
) -> float:
    """Seconds to the first token."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "prompt_cache_key": session,
    }
    first = 0.0
    async with httpx.AsyncClient(timeout=120) as client:
        started = time.perf_counter()
        async with client.stream("POST", f"{url or endpoint.url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    assert "error" not in json.loads(line[6:]), line
                    first = first or time.perf_counter() - started
    return first


async def ask_grpc(client: AsyncClient, prompt: list[int]) -> float:
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    first, started = 0.0, time.perf_counter()
    async for _ in client.stream(prompt, params, model="tiny"):
        first = first or time.perf_counter() - started
    return first


async def one_round(endpoint: Replicas, prompts: list[list[int]], concurrency: int) -> tuple[list[float], float]:
    """Seconds to the first token of each, and how long all took."""
    waiting, seconds = iter(enumerate(prompts)), []
    started = time.perf_counter()
    async with AsyncClient(endpoint.grpc_address) as grpc:

        async def client() -> None:
            for i, prompt in waiting:
                seconds.append(await (ask_grpc(grpc, prompt) if i % 2 else ask_http(endpoint, prompt)))

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return seconds, time.perf_counter() - started


def hit_rate(endpoint: Replicas) -> tuple[float, float]:
    """Prompt tokens found and looked for in the prefix caches, of all replicas."""
    found: dict[str, tuple[float, float]] = {}
    while len(found) < 2:
        families = {
            each.name: each for each in text_string_to_metric_families(httpx.get(f"{endpoint.url}/metrics").text)
        }
        hits, queries = (families[f"rayllm_prefix_{name}_tokens"].samples[0] for name in ("hit", "query"))
        found[hits.labels["replica"]] = hits.value, queries.value
    return sum(hits for hits, _ in found.values()), sum(queries for _, queries in found.values())


def replicas_by_port(endpoint: Replicas) -> dict[str, str]:
    """Where each replica listens itself, past the proxy."""
    ours = {replica_of(f"{endpoint.url}/metrics") for _ in range(40)}
    found = {}
    for port in range(FIRST_PORT, FIRST_PORT + 16):
        with contextlib.suppress(httpx.HTTPError, KeyError):
            url = f"http://127.0.0.1:{port}"
            if (name := replica_of(f"{url}/metrics")) in ours:
                found[name] = url
    assert len(found) == 2, f"{found} of {ours}"
    return found


def replica_of(url: str) -> str:
    families = text_string_to_metric_families(httpx.get(url, timeout=5).text)
    return next(each for each in families if each.name == "rayllm_running").samples[0].labels["replica"]


async def hop(endpoint: Replicas, requests: int) -> dict[str, float]:
    """Milliseconds to the first token of short prompts, one at a time: those that stay where they came in, and those
    that are sent on."""
    urls = replicas_by_port(endpoint)
    candidates = [Candidate(name=name) for name in urls]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    rng = random.Random(5)
    for i in range(requests):
        session = str(i)
        owner = decide(candidates, local="", policy="prefix", prompt_tokens=16, session=session, rng=rng).replica
        for name in rng.sample(list(urls), 2):
            prompt = [rng.randrange(100, 40000) for _ in range(16)]
            took = await ask_http(endpoint, prompt, url=urls[name], session=session)
            if i >= requests // 10:  # the first open connections and warm up
                seconds[name == owner].append(took)
    local, forwarded = (1e3 * median(seconds[is_local]) for is_local in (True, False))
    return {"local_ttft_ms": local, "forwarded_ttft_ms": forwarded, "hop_ms": forwarded - local}


def cpu_seconds(endpoint: Replicas) -> float:
    total = 0.0
    for pid in {endpoint.process.pid, *descendants(endpoint.process.pid)}:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def idle(endpoints: dict[str, Replicas]) -> dict[str, float]:
    """Share of one core that each endpoint takes, all processes of Ray and Serve together."""
    before = {name: cpu_seconds(endpoint) for name, endpoint in endpoints.items()}
    started = time.monotonic()
    time.sleep(IDLE_S)
    elapsed = time.monotonic() - started
    return {name: (cpu_seconds(endpoint) - before[name]) / elapsed for name, endpoint in endpoints.items()}


def milliseconds(seconds: list[float]) -> dict[str, float]:
    return {"ttft_p50_ms": 1e3 * median(seconds), "ttft_p90_ms": 1e3 * quantiles(seconds, n=10)[-1]}


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
        endpoints = {}
        for name, (routing, environment) in POLICIES.items():
            sections = {
                "model": {"model": arguments.model, "dtype": "bfloat16"},
                "cache": {"num_blocks": arguments.num_blocks},
                "serve": {"num_replicas": 2, "routing": routing},
            }
            endpoints[name] = stack.enter_context(running(sections, **environment))
        time.sleep(ACQUAINTED_S)
        seconds: dict[str, list[float]] = {name: [] for name in endpoints}
        medians: dict[str, list[float]] = {name: [] for name in endpoints}
        durations: dict[str, float] = dict.fromkeys(endpoints, 0.0)
        for endpoint in endpoints.values():  # compiled and warm; not counted
            asyncio.run(one_round(endpoint, load(-1, 2, 2), 2))
        before = {name: hit_rate(endpoint) for name, endpoint in endpoints.items()}
        order = itertools.cycle(itertools.permutations(endpoints))
        for i in range(arguments.rounds):
            for name in next(order):
                prompts = load(i, arguments.documents, arguments.questions)
                took, duration = asyncio.run(one_round(endpoints[name], prompts, arguments.concurrency))
                seconds[name] += took
                medians[name].append(1e3 * median(took))
                durations[name] += duration
        for name, endpoint in endpoints.items():
            hits, queries = (now - then for now, then in zip(hit_rate(endpoint), before[name], strict=True))
            report[name] = milliseconds(seconds[name]) | {
                "ttft_p50_ms_by_round": medians[name],
                "requests_per_s": len(seconds[name]) / durations[name],
                "prefix_hits": hits / queries,
            }
        report["hop"] = asyncio.run(hop(endpoints["prefix"], 60))
        report["load_after"] = os.getloadavg()
        report["idle_share_of_a_core"] = idle(endpoints)
    report["random_over_prefix"] = report["random"]["ttft_p50_ms"] / report["prefix"]["ttft_p50_ms"]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
