"""The processes of `rayllm serve`: told to stop before it is ready, killed from outside; and over an int8 directory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from rayllm.core.config import CacheConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from tests.ports import free_ports
from tests.ray.processes import descendants, wait_gone

pytestmark = pytest.mark.ray


def ray_starts(pids: set[int]) -> bool:
    return len(pids) >= 2


def serve_starts(pids: set[int]) -> bool:
    return bool(named("ray::ServeController", pids))


def named(title: str, pids: set[int]) -> set[int]:
    """Those whose command line holds `title`."""
    found = set()
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if title in command:
            found.add(pid)
    return found


def start(model: Path) -> tuple[subprocess.Popen[str], str]:
    """-> the server, and where it will answer."""
    http_port, grpc_port = map(str, free_ports(2))
    rayllm = Path(sys.executable).with_name("rayllm")
    server = subprocess.Popen(
        [rayllm, "serve", model, "--http-port", http_port, "--grpc-port", grpc_port],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return server, f"http://127.0.0.1:{http_port}"


@pytest.mark.parametrize("begun", [ray_starts, serve_starts])
def test_sigterm_before_it_is_ready_ends_it_as_ctrl_c_does(tiny_model: Path, begun: Callable[[set[int]], bool]) -> None:
    server, _ = start(tiny_model)
    started: set[int] = set()
    while not begun(started):
        assert server.poll() is None
        started |= descendants(server.pid)
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    while server.poll() is None:
        started |= descendants(server.pid)
        time.sleep(0.01)
    output, errors = server.communicate()
    assert server.returncode == 130, errors
    assert output == ""
    assert "Traceback" not in errors
    assert "SIGTERM" not in errors, "Ray's core took it, which aborts this process three seconds later"
    assert wait_gone(started, 10) == set()


def test_a_killed_proxy_takes_haproxy_along_and_both_come_back(tiny_model: Path) -> None:
    server, url = start(tiny_model)
    started: set[int] = set()
    try:
        assert server.stdout is not None
        assert "is ready" in server.stdout.readline()
        started = descendants(server.pid)
        proxies, haproxies = named("ray::HAProxyManager", started), named("bin/haproxy", started)
        assert len(proxies) == len(haproxies) == 1
        os.kill(*proxies, signal.SIGKILL)
        assert wait_gone(proxies | haproxies, 5) == set()
        give_up = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < give_up
                time.sleep(0.1)
        started |= descendants(server.pid)
        assert len(named("bin/haproxy", descendants(server.pid))) == 1
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate()
    assert server.returncode == 0
    assert wait_gone(started, 10) == set()


@pytest.mark.parametrize(
    "options", [("--scheme", "w8a16"), ("--scheme", "w8a8", "--outliers", "mixed")], ids=["w8a16", "w8a8-mixed"]
)
def test_an_int8_directory_answers_as_it_does_offline(
    tiny_model: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """As `rayllm quantize` has written it."""
    out = tmp_path / "int8"
    rayllm = Path(sys.executable).with_name("rayllm")
    subprocess.run([rayllm, "quantize", tiny_model, out, *options], check=True)
    prompts = ["Once upon a time", "한국어", "the"]
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(str(tiny_model), cache=CacheConfig(num_blocks=100)) as llm:
        exact = [llm.generate(prompt, greedy)[0].outputs[0].token_ids for prompt in prompts]
    with LLM(str(out), cache=CacheConfig(num_blocks=100)) as llm:
        expected = [llm.generate(prompt, greedy)[0].outputs[0].token_ids for prompt in prompts]
    assert expected != exact, "these prompts do not tell int8 weights from others"
    server, url = start(out)
    try:
        assert server.stdout is not None
        assert "is ready" in server.stdout.readline()
        body = {"model": "int8", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        for prompt, token_ids in zip(prompts, expected, strict=True):
            answer = httpx.post(f"{url}/v1/completions", json={**body, "prompt": prompt}, timeout=60)
            assert answer.raise_for_status().json()["choices"][0]["token_ids"] == token_ids
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate()
    assert server.returncode == 0
