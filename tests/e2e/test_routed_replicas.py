"""Two replicas that send requests on to each other, both faces, over real connections: a client cannot tell who
answers, whatever happens in between."""

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError, RaySystemError

from rayllm.client import AsyncClient
from rayllm.client.codec import generate_request
from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.async_engine import AsyncEngine
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.serve import peers
from rayllm.serve.local_state import LocalState
from rayllm.serve.peer import ABORT_S
from rayllm.serve.replica_state import SILENCE_S
from rayllm.serve.routed_engine import RoutedEngine
from rayllm.serve.routing import Candidate, decide
from tests.checkpoints import retrained, sealed
from tests.e2e.conftest import MODEL, Server, start
from tests.e2e.relay import Relay, Table

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = SamplingParams(max_tokens=24, ignore_eos=True)
LONG = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
PARAMS = {
    "greedy": replace(BASE, temperature=0.0),
    "sampled": replace(
        BASE, temperature=1.2, seed=7, top_k=60, top_p=0.95, frequency_penalty=0.5, logit_bias={70: 3.0}
    ),
    "three": replace(BASE, seed=11, n=3, stop_token_ids=tuple(range(100, 110))),
    "stop strings": replace(BASE, seed=12, max_tokens=60, stop=("e", "o", "a", "1")),
    "logprobs": replace(BASE, seed=10, logprobs=3, logprob_token_ids=(4, 1), prompt_logprobs=1),
}


@dataclass
class Replica:
    name: str
    server: Server
    routed: RoutedEngine
    state: LocalState
    relay: Relay
    draining: list[bool]

    def count(self, metric: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.server.service.metrics.render().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == f"{metric}_total"]
        return sum(each.value for each in samples if labels.items() <= each.labels.items())

    @property
    def sent_on(self) -> float:
        return self.count("rayllm_routed_requests", target="peer")

    async def free(self) -> None:
        await self.server.settled()


@dataclass
class Pair:
    a: Replica
    b: Replica

    async def acquainted(self, within_s: float = 15.0) -> None:
        """Each knows the other's present state."""
        give_up = time.monotonic() + within_s
        while not all(self._knows(here, there) for here, there in ((self.a, self.b), (self.b, self.a))):
            assert time.monotonic() < give_up, "the replicas have not found each other"
            await asyncio.sleep(0.02)

    def _knows(self, here: Replica, there: Replica) -> bool:
        views = [peer.view for peer in here.routed._peers.known() if peer.name == there.name]
        snapshot = there.state.snapshot()
        return (
            bool(views)
            and views[0] is not None
            and (
                views[0].keys == snapshot.keys
                and views[0].state.weight_version == snapshot.weight_version
                and views[0].state.queued_tokens == snapshot.queued_tokens
                and views[0].state.is_draining == snapshot.is_draining
            )
        )


def session_of(name: str, salt: str = "", among: str = "ab") -> str:
    """One that is the replica's."""
    candidates = [Candidate(name=each) for each in among]
    for i in range(1000):
        session = f"{salt}{i}"
        decision = decide(
            candidates, local="a", policy="prefix", prompt_tokens=9, session=session, rng=random.Random(0)
        )
        if decision.replica == name:
            return session
    raise AssertionError


@asynccontextmanager
async def pair(model: Path, **scheduler: int) -> AsyncIterator[Pair]:
    async with started("ab", model, **scheduler) as replicas:
        both = Pair(*replicas)
        await both.acquainted()
        yield both


@asynccontextmanager
async def started(names: str, model: Path, **scheduler: int) -> AsyncIterator[list[Replica]]:
    """One after the other, and they need not have found each other."""
    config = EngineConfig(
        model=ModelConfig(model=str(model)),
        cache=CacheConfig(num_blocks=200),
        scheduler=SchedulerConfig(**scheduler),
    )
    relays = {name: Relay() for name in names}
    table, key = Table(relays), secrets.token_bytes(32)
    async with AsyncExitStack() as stack:
        for relay in relays.values():
            await relay.start()
            stack.push_async_callback(relay.close)
        yield [await stack.enter_async_context(_replica(name, config, model, table, key)) for name in names]


@asynccontextmanager
async def _replica(name: str, config: EngineConfig, model: Path, table: Table, key: bytes) -> AsyncIterator[Replica]:
    engine = AsyncEngine.start(config)
    draining = [False]
    state = LocalState(
        engine,
        block_size=config.cache.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        is_draining=lambda: draining[0],
    )
    routed = RoutedEngine(engine, state, table, name=name, key=key, policy="prefix")
    await routed.start("127.0.0.1")
    async for server in start(engine, model, routed):
        yield Replica(name, server, routed, state, table.relays[name], draining)
        await routed.close(drain_timeout_s=5)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replicas(tiny_model: Path) -> AsyncIterator[Pair]:
    async with pair(tiny_model) as both:
        yield both


@pytest_asyncio.fixture(loop_scope="module")
async def both(replicas: Pair) -> AsyncIterator[Pair]:
    """Acquainted before and free after each test."""
    await replicas.acquainted()
    yield replicas
    for replica in (replicas.a, replicas.b):
        await replica.free()
        assert replica.state.queued_tokens == 0


def prompt() -> str:
    """None that a cache has."""
    return secrets.token_hex(24)


Ask = Callable[[Server, str, SamplingParams, str], Awaitable[Any]]


def body(text: str, params: SamplingParams, session: str) -> dict[str, Any]:
    given = {
        name: value
        for name in ("temperature", "seed", "max_tokens", "n", "top_k", "top_p", "frequency_penalty", "ignore_eos")
        if (value := getattr(params, name)) is not None
    }
    return {
        "model": MODEL,
        **given,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
        "logit_bias": {str(token): bias for token, bias in params.logit_bias.items()},
        "prompt_logprobs": params.prompt_logprobs,
        "logprob_token_ids": list(params.logprob_token_ids),
        "return_token_ids": True,
        "request_id": "same",
        "prompt_cache_key": session,
    }


async def completion(server: Server, text: str, params: SamplingParams, session: str) -> Any:
    response = await server.http.post(
        "/v1/completions", json=body(text, params, session) | {"prompt": text, "logprobs": params.logprobs}
    )
    assert response.status_code == 200, response.text
    return response.json() | {"created": 0}, response.headers["x-weight-version"]


async def chat(server: Server, text: str, params: SamplingParams, session: str) -> Any:
    asked = body(text, params, session) | {"messages": [{"role": "user", "content": text}]}
    if params.logprobs is not None:
        asked |= {"logprobs": True, "top_logprobs": params.logprobs}
    response = await server.http.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json() | {"created": 0}


async def completion_stream(server: Server, text: str, params: SamplingParams, session: str) -> Any:
    """The events by choice, for those of several choices come in any order, and pieces may be merged."""
    # What shares the batch shows in the last bits of log-probabilities, and two prompts may share it or not.
    prompts = [text] if params.logprobs is not None else [text, "!" + text]
    asked = body(text, params, session) | {"prompt": prompts, "logprobs": params.logprobs, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    async with server.http.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    whole = choices.setdefault(choice["index"], {"text": "", "token_ids": [], "logprobs": []})
                    whole["text"] += choice["text"]
                    whole["token_ids"] += choice["token_ids"]
                    whole["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
                    whole["finish"] = choice["finish_reason"], choice["stop_reason"]
                    whole.setdefault("prompt_logprobs", choice.get("prompt_logprobs"))
    assert line == "" or line == "data: [DONE]"
    return choices, usage


async def rpc(server: Server, text: str, params: SamplingParams, session: str) -> Any:
    return await server.grpc.Generate(message(text, params, session))


async def rpc_stream(server: Server, text: str, params: SamplingParams, session: str) -> Any:
    outputs = [pb.Completion(index=i) for i in range(params.n)]
    prompt_logprobs: list[Any] = []
    usage = None
    async for chunk in server.grpc.GenerateStream(message(text, params, session)):
        output = outputs[chunk.index]
        output.text += chunk.text
        output.token_ids.extend(chunk.token_ids)
        output.logprobs.extend(chunk.logprobs)
        output.finish_reason = chunk.finish_reason
        output.stop_string = chunk.stop_string
        prompt_logprobs += chunk.prompt_logprobs
        if chunk.HasField("usage"):
            usage = chunk.usage
    return outputs, prompt_logprobs, usage, chunk.weight_version


async def _to_the_end(call: Any) -> None:
    async for _ in call:
        pass


def message(text: str, params: SamplingParams, session: str, **options: Any) -> pb.GenerateRequest:
    options = {"request_id": "same", "timeout_s": None, **options}
    return generate_request(text, params, model=MODEL, session_id=session, **options)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("ask", [completion, chat, completion_stream, rpc, rpc_stream])
async def test_who_answers_makes_no_difference(both: Pair, ask: Ask, params: SamplingParams):
    text, sent = prompt(), both.a.sent_on
    here = await ask(both.a.server, text, params, session_of("a"))
    assert both.a.sent_on == sent
    there = await ask(both.a.server, text, params, session_of("b"))
    assert both.a.sent_on > sent
    assert both.b.sent_on == 0, "what was sent on is not sent on again"
    assert there == here


async def test_the_session_header_and_its_limits(both: Pair):
    asked = {"model": MODEL, "prompt": prompt(), "max_tokens": 2}
    sent = both.a.sent_on
    await both.a.server.http.post("/v1/completions", json=asked, headers={"x-session-id": session_of("b")})
    assert both.a.sent_on == sent + 1
    overridden = asked | {"prompt_cache_key": session_of("a")}
    await both.a.server.http.post("/v1/completions", json=overridden, headers={"x-session-id": session_of("b")})
    assert both.a.sent_on == sent + 1
    for given, field in (
        ({"json": asked | {"prompt_cache_key": "x" * 257}}, "prompt_cache_key"),
        ({"json": asked | {"prompt_cache_key": ""}}, "prompt_cache_key"),
        ({"json": asked, "headers": {"x-session-id": "x" * 257}}, "x-session-id"),
        ({"content": json.dumps(asked | {"prompt_cache_key": "\ud800"})}, "prompt_cache_key"),
        ({"content": json.dumps(asked | {"prompt_cache_key": session_of("b"), "stop": "\ud800"})}, "stop"),
    ):
        response = await both.a.server.http.post("/v1/completions", **given)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    with pytest.raises(grpc.aio.AioRpcError, match="session_id: must have 1 to 256") as refused:
        await both.a.server.grpc.Generate(message("x", BASE, "x" * 257))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_prefix_that_the_peer_holds_draws_its_like(both: Pair):
    document = prompt() * 4
    await completion(both.b.server, document + "one", BASE, session_of("b"))
    await both.acquainted()
    asked = {"model": MODEL, "prompt": document + "two", "max_tokens": 4}
    before = both.a.count("rayllm_routed_requests", reason="prefix", target="peer")
    answer = (await both.a.server.http.post("/v1/completions", json=asked)).json()
    assert both.a.count("rayllm_routed_requests", reason="prefix", target="peer") == before + 1
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 160
    await both.acquainted()
    asked["prompt"] = document + "three"
    await both.b.server.http.post("/v1/completions", json=asked)
    assert both.b.count("rayllm_routed_requests", reason="prefix", target="here") >= 1


async def test_an_error_of_the_peer_is_the_client_s(both: Pair):
    request = message("x", replace(BASE, seed=1, stop_token_ids=(5,)), session_of("b"))
    request.resume.weight_version = both.a.server.weights
    request.resume.sequences.add(token_ids=[4, 5])
    sent = both.a.sent_on
    with pytest.raises(grpc.aio.AioRpcError, match="resume: sequence 0 holds a token that had ended it") as refused:
        await both.a.server.generate("GenerateStream", request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert both.a.sent_on == sent + 1


@pytest.mark.parametrize("face", ["http", "grpc"])
async def test_a_client_that_leaves_frees_the_peer_s_blocks(both: Pair, face: str):
    session = session_of("b")
    if face == "http":
        asked = body(prompt(), LONG, session) | {"prompt": prompt(), "stream": True}
        async with both.a.server.http.stream("POST", "/v1/completions", json=asked) as response:
            await anext(response.aiter_lines())
            await both.b.server.running()
    else:
        call = both.a.server.grpc.GenerateStream(message(prompt(), LONG, session))
        await call.read()
        await both.b.server.running()
        call.cancel()
    while both.b.state.snapshot().running:
        await asyncio.sleep(0.001)
    await both.b.free()
    assert both.b.server.engine.stats().running == 0


async def test_a_client_that_leaves_before_the_first_token(both: Pair):
    both.b.relay.stop()
    tasks = [
        asyncio.create_task(
            both.a.server.http.post("/v1/completions", json=body("", LONG, session_of("b")) | {"prompt": "x"})
        )
    ]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    while both.a.server.service._live:
        await asyncio.sleep(0.001)
    both.b.relay.go_on()
    assert not [sent for peer in both.a.routed._peers.all() for sent in peer._sent]


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_a_deadline_holds_whatever_the_peer_does(both: Pair, is_stopped: bool):
    if is_stopped:
        both.b.relay.stop()
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await both.a.server.grpc.Generate(message(prompt(), LONG, session_of("b"), timeout_s=0.08))
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 1.0
    both.b.relay.go_on()


async def abort(replica: Replica, request_id: str) -> bool:
    return (await replica.server.grpc.Abort(pb.AbortRequest(request_id=request_id))).aborted


def long_stream(replica: Replica, *, at: str, request_id: str = "mine") -> Any:
    """A call that comes in at `replica` and runs at the one of this name."""
    return replica.server.grpc.GenerateStream(message(prompt(), LONG, session_of(at), request_id=request_id))


async def is_aborted(call: Any, request_id: str = "mine") -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=f"request {request_id} was aborted") as aborted:
        await _to_the_end(call)
    assert aborted.value.code() is grpc.StatusCode.CANCELLED
    assert aborted.value.trailing_metadata()["error-code"] == "aborted"


@pytest.mark.parametrize("runs_at", ["a", "b"])
@pytest.mark.parametrize("asked", ["a", "b"])
async def test_abort_reaches_a_request_wherever_it_runs(both: Pair, asked: str, runs_at: str):
    call = long_stream(both.a, at=runs_at)
    await getattr(both, runs_at).server.running()
    assert await abort(getattr(both, asked), "mine")
    await is_aborted(call)
    for replica in (both.a, both.b):
        assert not await abort(replica, "mine")


@pytest.mark.parametrize("runs_at", ["a", "b"])
async def test_abort_at_the_peer_reaches_an_http_request(both: Pair, runs_at: str):
    asked = body("", LONG, session_of(runs_at)) | {"prompt": [prompt(), prompt()], "request_id": "mine"}
    answering = asyncio.create_task(both.a.server.http.post("/v1/completions", json=asked))
    await getattr(both, runs_at).server.running(2)
    assert await abort(both.b, "mine")
    response = await answering
    assert (response.status_code, response.json()["error"]["code"]) == (499, "aborted")


async def test_one_abort_ends_all_requests_of_the_id(both: Pair):
    """Replicas do not ask each other whether an id is in use."""
    calls = [long_stream(both.a, at="a"), long_stream(both.b, at="b"), long_stream(both.b, at="b", request_id="other")]
    await both.a.server.running()
    await both.b.server.running(2)
    assert await abort(both.a, "mine")
    await is_aborted(calls[0])
    await is_aborted(calls[1])
    assert await abort(both.a, "other")
    await is_aborted(calls[2], "other")


@pytest.mark.parametrize("is_stopped", [False, True], ids=["ended", "stands still"])
async def test_abort_beside_a_peer_that_is_lost(both: Pair, is_stopped: bool):
    """What is found is aborted at once; that nothing is live cannot be said."""
    call = long_stream(both.a, at="a")
    await both.a.server.running()
    if is_stopped:
        both.b.relay.stop()
    else:
        both.b.relay.cut()
    begun = time.monotonic()
    assert await abort(both.a, "mine")
    assert time.monotonic() - begun < ABORT_S / 2
    await is_aborted(call)
    with pytest.raises(grpc.aio.AioRpcError, match="a replica does not say whether it has request mine") as unknown:
        await abort(both.a, "mine")
    assert unknown.value.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - begun < ABORT_S + 1
    if is_stopped:
        both.b.relay.go_on()
    else:
        await both.b.relay.start()


async def test_abort_finds_one_replica_while_another_stands_still(tiny_model: Path):
    async with started("abc", tiny_model) as (a, b, c):
        await Pair(a, b).acquainted()
        await Pair(a, c).acquainted()
        await Pair(b, c).acquainted()
        session = session_of("b", among="abc")
        call = b.server.grpc.GenerateStream(message(prompt(), LONG, session, request_id="mine"))
        await b.server.running()
        c.relay.stop()
        begun = time.monotonic()
        assert await abort(a, "mine")
        assert time.monotonic() - begun < ABORT_S / 2
        await is_aborted(call)
        c.relay.go_on()


async def test_abort_finds_a_replica_that_has_just_joined(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "_LOOK_S", 60.0)
    async with started("ab", tiny_model) as (a, b):
        assert not a.routed._peers.all()
        call = b.server.grpc.GenerateStream(message(prompt(), LONG, session_of("b"), request_id="mine"))
        await b.server.running()
        assert await abort(a, "mine")
        await is_aborted(call)


async def test_abort_when_the_directory_is_away(both: Pair, monkeypatch: pytest.MonkeyPatch):
    def away(_: Table) -> dict[str, Any]:
        raise RayError

    monkeypatch.setattr(Table, "replicas", away)
    call = long_stream(both.b, at="b")
    await both.b.server.running()
    assert await abort(both.a, "mine")
    await is_aborted(call)
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await abort(both.a, "mine")
    assert unknown.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("params", [*PARAMS.values(), LONG], ids=[*PARAMS, "long"])
async def test_a_peer_killed_under_its_answers(both: Pair, params: SamplingParams):
    text = prompt()
    expected = await rpc_stream(both.a.server, text, params, session_of("a"))
    sent, lost = both.a.sent_on, both.a.count("rayllm_peer_failures", kind="lost")
    answers = [asyncio.create_task(rpc_stream(each, text, params, session_of("b"))) for each in [both.a.server]]
    while both.a.sent_on == sent:
        await asyncio.sleep(0)
    for _ in range(3 if params is not LONG else 60):
        await asyncio.sleep(0.0005)
    both.b.relay.cut()
    (answer,) = await asyncio.gather(*answers)
    assert [output.token_ids for output in answer[0]] == [output.token_ids for output in expected[0]]
    assert [output.text for output in answer[0]] == [output.text for output in expected[0]]
    assert [output.finish_reason for output in answer[0]] == [output.finish_reason for output in expected[0]]
    for part, whole in ((answer[0][0].logprobs, expected[0][0].logprobs), (answer[1], expected[1])):
        assert [each.token_id for each in part] == [each.token_id for each in whole], "the prompt's once"
        # After the seam the last bits may differ: the tokens before it are computed together, not one by one.
        assert [each.logprob for each in part] == pytest.approx([each.logprob for each in whole], abs=1e-4)
    assert answer[2].completion_tokens == expected[2].completion_tokens
    if params is LONG:
        assert both.a.count("rayllm_peer_failures", kind="lost") == lost + 1
    await both.b.relay.start()


@pytest.mark.parametrize("first", [False, True], ids=["before the first token", "after it"])
async def test_a_peer_that_stands_still(both: Pair, first: bool):
    """No connection ends: silence tells."""
    text = prompt()
    expected = await rpc_stream(both.a.server, text, LONG, session_of("a"))
    if not first:
        both.b.relay.stop()
    call = both.a.server.grpc.GenerateStream(message(text, LONG, session_of("b")))
    tokens: list[int] = []
    started = time.monotonic()
    async for chunk in call:
        tokens += chunk.token_ids
        if first and len(tokens) == 1:
            both.b.relay.stop()
    assert tokens == list(expected[0][0].token_ids)
    assert time.monotonic() - started < SILENCE_S + 5
    both.b.relay.go_on()


async def test_without_a_seed_too_an_answer_goes_on(both: Pair):
    params = replace(LONG, temperature=1.0)
    sent = both.a.sent_on
    task = asyncio.create_task(rpc_stream(both.a.server, prompt(), params, session_of("b")))
    while both.a.sent_on == sent or not both.b.server.engine.stats().running:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.03)
    both.b.relay.cut()
    outputs, _, usage, _ = await task
    assert len(outputs[0].token_ids) == usage.completion_tokens == 300
    await both.b.relay.start()


async def test_a_replica_that_is_lost_leaves_nothing_with_its_peers(both: Pair):
    """Who sent a request stands still: nobody reads its answer, which need not be completed."""
    params = replace(LONG, max_tokens=400)
    call = both.a.server.grpc.GenerateStream(message(prompt(), params, session_of("b")))
    await call.read()
    both.a.relay.stop()  # by which b hears of a
    both.b.relay.stop()
    give_up = time.monotonic() + SILENCE_S + 3
    while both.b.state.snapshot().running:
        assert time.monotonic() < give_up
        await asyncio.sleep(0.02)
    await both.b.free()
    both.a.relay.go_on()
    both.b.relay.go_on()
    call.cancel()


async def test_a_draining_peer_gets_nothing_more(both: Pair):
    both.b.draining[0] = True
    refused, sent = both.a.count("rayllm_peer_failures", kind="refused"), both.a.sent_on
    await rpc(both.a.server, prompt(), BASE, session_of("b"))  # before the news has come
    assert both.a.sent_on == sent + 1
    assert both.a.count("rayllm_peer_failures", kind="refused") == refused + 1
    await both.acquainted()
    await rpc(both.a.server, prompt(), BASE, session_of("b"))
    assert both.a.sent_on == sent + 1
    both.b.draining[0] = False


async def test_a_full_peer_sends_nobody_away(tiny_model: Path):
    async with pair(tiny_model, max_num_seqs=1, max_waiting_requests=1) as both:
        session = session_of("b")
        calls = [
            both.b.server.grpc.GenerateStream(message(prompt(), LONG, session, request_id=f"{i}")) for i in range(2)
        ]
        await calls[0].read()
        answer = await rpc(both.a.server, prompt(), BASE, session)
        assert len(answer.outputs[0].token_ids) == 24
        for call in calls:
            call.cancel()


async def test_leaving_waits_for_what_peers_sent(tiny_model: Path):
    async with pair(tiny_model) as both:
        task = asyncio.create_task(rpc_stream(both.a.server, prompt(), LONG, session_of("b")))
        await both.b.server.running()
        await both.b.routed.close(drain_timeout_s=20)
        outputs, *_ = await task
        assert len(outputs[0].token_ids) == 300
        assert both.a.count("rayllm_peer_failures") == 0
        assert both.b.server.engine.stats().generated_tokens >= 300
        give_up = time.monotonic() + 10
        while both.a.routed._peers.all():
            assert time.monotonic() < give_up, "a peer that has left is still looked for"
            await asyncio.sleep(0.05)
        assert await rpc(both.a.server, prompt(), BASE, session_of("b"))


async def test_leaving_waits_although_the_directory_is_away(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    def away(table: Table, name: str) -> None:
        raise RaySystemError("the control service does not answer")

    async with pair(tiny_model) as both:
        task = asyncio.create_task(rpc_stream(both.a.server, prompt(), LONG, session_of("b")))
        await both.b.server.running()
        monkeypatch.setattr(Table, "leave", away)
        await both.b.routed.close(drain_timeout_s=20)
        assert both.b.server.engine.stats().generated_tokens >= 300
        assert len((await task)[0][0].token_ids) == 300
        assert both.a.count("rayllm_peer_failures") == 0


async def test_a_piece_too_large_for_a_message(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("peer", "routed_engine"):
        monkeypatch.setattr(f"rayllm.serve.{module}.MAX_MESSAGE_BYTES", 20_000)
    params = replace(BASE, temperature=0.0, prompt_logprobs=20)
    async with pair(tiny_model) as both:
        text = prompt() * 4
        expected = await rpc_stream(both.a.server, text, params, session_of("a"))
        answer = await rpc_stream(both.a.server, text, params, session_of("b"))
        assert answer[0] == expected[0]
        assert len(answer[1]) == len(expected[1]) > 150
        assert both.a.count("rayllm_peer_failures", kind="lost") == 1


async def test_weights_decide_who_may_answer(tiny_model: Path, tmp_path: Path):
    other = sealed(retrained(tiny_model, tmp_path / "other", seed=1))
    async with pair(tiny_model) as both:
        old, new = both.a.server.weights, await both.b.server.engine.load_weights(other)
        both.b.server.engine.use_weights(new)
        sent = both.a.sent_on  # the news has not come: the peer answers by the weights that were asked for
        answer = await rpc(both.a.server, prompt(), BASE, session_of("b"))
        assert (answer.weight_version, both.a.sent_on) == (old, sent + 1)
        await both.acquainted()
        for replica, version in ((both.a, old), (both.b, new)):
            for name in "ab":
                assert (await rpc(replica.server, prompt(), BASE, session_of(name))).weight_version == version
        assert (both.a.sent_on, both.b.sent_on) == (sent + 1, 0), "a canary gets its share and no more"
        params = replace(BASE, temperature=0.0)
        text = prompt()
        expected = await rpc(both.b.server, text, params, "")
        request = message(text, params, "")
        request.resume.weight_version = new
        request.resume.sequences.add(token_ids=expected.outputs[0].token_ids[:9])
        tokens = [token async for chunk in both.a.server.grpc.GenerateStream(request) for token in chunk.token_ids]
        assert tokens == list(expected.outputs[0].token_ids[9:]), "who has not the weights asks the one that has"


async def test_the_client_s_session_is_the_server_s(both: Pair):
    sent = both.a.sent_on
    async with AsyncClient(both.a.server.grpc_address) as client:
        await client.generate(prompt(), BASE, session_id=session_of("b"))
        async for _ in client.stream(prompt(), BASE, session_id=session_of("b")):
            pass
    assert both.a.sent_on == sent + 2


async def test_many_streams_of_which_half_leave(both: Pair):
    rng = random.Random(1)
    text, params = prompt(), replace(BASE, temperature=0.0, max_tokens=60)
    expected = (await rpc(both.a.server, text, params, session_of("a"))).outputs[0].token_ids

    async def one(i: int) -> None:
        server = rng.choice((both.a, both.b)).server
        call = server.grpc.GenerateStream(message(text, params, session_of(rng.choice("ab")), request_id=f"{i}"))
        stop_after = rng.randrange(60) if i % 2 else 1000
        tokens: list[int] = []
        async for chunk in call:
            tokens += chunk.token_ids
            if len(tokens) > stop_after:
                call.cancel()
                return
        assert tokens == expected

    await asyncio.gather(*(one(i) for i in range(60)))
    while any(replica.state.snapshot().running for replica in (both.a, both.b)):
        await asyncio.sleep(0.001)
