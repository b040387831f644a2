"""`rayllm promote` and `rollback` against an endpoint of two replicas that clients never stop asking."""

import io
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import httpx
import pytest

from rayllm.cli.main import main
from rayllm.core.config import CacheConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.models.weight_version import weight_version
from tests.checkpoints import changed, flip_a_bit, retrained, sealed
from tests.e2e.replicas import Replicas, ask, running
from tests.ray.processes import descendants

pytestmark = pytest.mark.ray

PROMPTS = ["Once upon a time", "the", "한국어"]
TOKENS = 24


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed(retrained(tiny_model, tmp_path_factory.mktemp("other") / "model", seed=1))


@pytest.fixture(scope="module")
def near_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of nearly the same perplexity."""

    def nudge(tensors: dict) -> None:
        tensors["model.embed_tokens.weight"].mul_(1.0001)

    return changed(tiny_model, tmp_path_factory.mktemp("near") / "model", nudge)


@pytest.fixture(scope="module")
def expected(tiny_model: Path, other_model: Path, near_model: Path) -> dict[str, list[str]]:
    """What each version answers, by a plain engine."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    texts = {}
    for model in (tiny_model, other_model, near_model):
        with LLM(str(model), cache=CacheConfig(num_blocks=100)) as llm:
            texts[weight_version(model)] = [output.outputs[0].text for output in llm.generate(PROMPTS, params)]
    return texts


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the endpoint leaves its key."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def endpoint(tiny_model: Path, cache: str) -> Iterator[Replicas]:
    sections = {"model": {"model": str(tiny_model)}, "cache": {"num_blocks": 100}, "serve": {"num_replicas": 2}}
    with running(sections, XDG_CACHE_HOME=cache) as replicas:
        yield replicas


@contextmanager
def clients(endpoint: Replicas, expected: dict[str, list[str]]) -> Iterator[Counter[str]]:
    """Ask on and on, each answer checked against those of the weights that it names; how many named each."""
    named: Counter[str] = Counter()
    ended = threading.Event()

    def client(index: int) -> None:
        while not ended.is_set():
            answer = ask(endpoint.url, PROMPTS[index], max_tokens=TOKENS, temperature=0)
            assert answer["choices"][0]["text"] == expected[answer["system_fingerprint"]][index]
            named[answer["system_fingerprint"]] += 1

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asking = [pool.submit(client, index) for index in range(len(PROMPTS))]
        try:
            yield named
        finally:
            ended.set()
        for each in asking:
            each.result()


def rayllm(endpoint: Replicas, cache: str, *arguments: object, status: int = 0) -> str:
    """Runs the command in this process; -> what it says."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(sys, "argv", ["rayllm", *map(str, arguments), "--url", endpoint.url])
        patch.setenv("XDG_CACHE_HOME", cache)
        with pytest.raises(SystemExit) as ended:
            main()
    assert int(ended.value.code or 0) == status, said.getvalue()
    return said.getvalue()


def served(endpoint: Replicas) -> set[str]:
    """By all replicas that a client may reach."""
    return {ask(endpoint.url, "x", max_tokens=1)["system_fingerprint"] for _ in range(24)}


def test_promote_and_roll_back(endpoint, cache, expected, tiny_model, other_model, tmp_path):
    old, new, _ = expected
    damaged = flip_a_bit(sealed(retrained(tiny_model, tmp_path / "damaged", seed=2)))
    with clients(endpoint, expected) as named:
        assert f"all replicas serve {new}" in rayllm(endpoint, cache, "promote", other_model)
        assert served(endpoint) == {new}
        assert "is damaged" in rayllm(endpoint, cache, "promote", damaged, status=1)
        assert served(endpoint) == {new}
        assert f"all replicas serve {old}" in rayllm(endpoint, cache, "rollback")
        assert served(endpoint) == {old}
    assert set(named) == {old, new}


def test_a_canary_is_tried_by_some(endpoint, cache, expected, other_model, near_model):
    old, new, _ = expected
    with clients(endpoint, expected):
        told = rayllm(endpoint, cache, "promote", other_model, "--canary", "10%")
        assert f"{new} goes to 1 of 2 replicas" in told
        assert served(endpoint) == {old, new}
        assert f"{new} is being tried by 1 of the replicas" in rayllm(endpoint, cache, "promote", near_model, status=1)
        rayllm(endpoint, cache, "rollback")
        assert served(endpoint) == {old}
        rayllm(endpoint, cache, "promote", other_model, "--canary", "50%")
        rayllm(endpoint, cache, "promote", other_model)
        assert served(endpoint) == {new}
        rayllm(endpoint, cache, "rollback")
        assert served(endpoint) == {old}


def test_a_gate_lets_through_what_is_as_good(endpoint, cache, expected, other_model, near_model, tmp_path):
    """The text is the running weights' own: nothing is more likely to them, and other weights cannot say it as well."""
    old, _, near = expected
    gate = tmp_path / "gate.txt"
    answer = ask(endpoint.url, PROMPTS[0], max_tokens=400, temperature=0)
    assert answer["system_fingerprint"] == old, "other weights say other things, NUL among them, which no text may hold"
    gate.write_text(answer["choices"][0]["text"])
    with clients(endpoint, expected) as named:
        told = rayllm(endpoint, cache, "promote", other_model, "--gate", gate, status=1)
        assert "more than 1% above" in told
        assert served(endpoint) == {old}
        told = rayllm(endpoint, cache, "promote", near_model, "--canary", "10%", "--gate", gate)
        assert "served by 1; perplexity" in told
        assert served(endpoint) == {near}
        rayllm(endpoint, cache, "rollback")
    assert set(named) == {old, near}, "no client was answered by weights that did not pass"


def test_a_replica_that_starts_anew_has_the_promoted_weights(endpoint, cache, expected, other_model):
    old, new, _ = expected
    rayllm(endpoint, cache, "promote", other_model)
    replicas = [
        pid
        for pid in descendants(endpoint.process.pid)
        if b"ray::ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(max(replicas), signal.SIGKILL)
    give_up = time.monotonic() + 60
    while True:
        try:
            assert served(endpoint) == {new}
            if len({replica(endpoint) for _ in range(12)}) == 2:
                break
        except httpx.HTTPStatusError:  # while the lost one is not noticed
            pass
        assert time.monotonic() < give_up
        time.sleep(0.5)
    assert f"all replicas serve {old}" in rayllm(endpoint, cache, "rollback")


def replica(endpoint: Replicas) -> str:
    """Of whichever replica answers: its name in the metrics."""
    return httpx.get(f"{endpoint.url}/metrics").text.split('rayllm_running{replica="')[1][:8]


def test_only_who_has_the_key_may(endpoint, other_model, tmp_path):
    body = {"checkpoint": str(other_model)}
    for headers in ({}, {"authorization": "Bearer guessed"}):
        refused = httpx.post(f"{endpoint.url}/admin/promote", json=body, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    told = rayllm(endpoint, str(tmp_path), "promote", other_model, status=1)
    assert "no endpoint that you started listens there; for one of somebody else set RAYLLM_ADMIN_KEY" in told
