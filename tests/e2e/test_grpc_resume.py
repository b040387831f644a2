"""A stream that goes on after its tokens: at every seam, against the answer that was never interrupted.

Sequences of random bytes are what this model writes, so that characters are cut in half at most seams.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import pytest_asyncio

from rayllm.client import AsyncClient, Chunk, Client
from rayllm.client.attempts import MAX_CUTS
from rayllm.client.codec import generate_request
from rayllm.core.errors import CapacityError, EngineUnavailableError, InvalidRequestError, RequestAbortedError
from rayllm.core.types import FinishReason, SamplingParams
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.serve.grpc_service import InferenceServicer, add_inference_to_server
from tests.e2e.conftest import MODEL, Server, as_serve_does

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "서울 and the 🙂"
BASE = SamplingParams(max_tokens=24, ignore_eos=True)
PARAMS = {
    "greedy": replace(BASE, temperature=0.0),
    "sampled": replace(BASE, temperature=1.2, seed=7, top_k=60, top_p=0.95, min_p=0.001),
    "penalties": replace(
        BASE, seed=8, repetition_penalty=1.4, frequency_penalty=0.8, presence_penalty=0.6, logit_bias={70: 3.0}
    ),
    "stop tokens": replace(BASE, seed=9, max_tokens=40, min_tokens=14, stop_token_ids=tuple(range(60, 140))),
    "logprobs": replace(BASE, seed=10, logprobs=3, logprob_token_ids=(4, 1), prompt_logprobs=1),
    "three": replace(BASE, seed=11, n=3, max_tokens=20, stop_token_ids=tuple(range(100, 110))),
}


class Answer:
    """What the pieces of a stream come to, and where each ended."""

    def __init__(self, n: int) -> None:
        self.sequences = [pb.Completion(index=i) for i in range(n)]
        self.prompt_logprobs: list[pb.TokenLogprobs] = []
        self.usage: pb.Usage | None = None

    def take(self, chunk: pb.GenerateChunk) -> None:
        assert self.usage is None
        sequence = self.sequences[chunk.index]
        assert sequence.finish_reason == pb.FINISH_REASON_UNSPECIFIED
        sequence.text += chunk.text
        sequence.token_ids.extend(chunk.token_ids)
        sequence.logprobs.extend(chunk.logprobs)
        sequence.finish_reason = chunk.finish_reason
        if chunk.HasField("stop_string"):
            sequence.stop_string = chunk.stop_string
        elif chunk.HasField("stop_token_id"):
            sequence.stop_token_id = chunk.stop_token_id
        self.prompt_logprobs.extend(chunk.prompt_logprobs)
        self.usage = chunk.usage if chunk.HasField("usage") else None

    def resumption(self, weights: str) -> pb.Resumption:
        sequences = [
            pb.ResumedSequence(token_ids=each.token_ids, finished=each.finish_reason != 0) for each in self.sequences
        ]
        return pb.Resumption(weight_version=weights, sequences=sequences)

    def assert_equals(self, other: "Answer") -> None:
        for mine, theirs in zip(self.sequences, other.sequences, strict=True):
            assert list(mine.token_ids) == list(theirs.token_ids)
            assert mine.text == theirs.text
            assert (mine.finish_reason, mine.stop_string) == (theirs.finish_reason, theirs.stop_string)
            assert mine.stop_token_id == theirs.stop_token_id
            assert [p.token_id for p in mine.logprobs] == [p.token_id for p in theirs.logprobs]
            # A token computed in a prompt's chunk differs from one computed alone in the last bits.
            assert [p.logprob for p in mine.logprobs] == pytest.approx([p.logprob for p in theirs.logprobs], abs=1e-4)
            assert [len(p.top) for p in mine.logprobs] == [len(p.top) for p in theirs.logprobs]
        assert [p.token_id for p in self.prompt_logprobs] == [p.token_id for p in other.prompt_logprobs]
        assert self.usage is not None
        assert other.usage is not None
        assert self.usage.prompt_tokens == other.usage.prompt_tokens
        assert self.usage.completion_tokens == other.usage.completion_tokens
        assert 0 <= self.usage.cached_tokens <= self.usage.prompt_tokens


def request(params: SamplingParams, **options: Any) -> pb.GenerateRequest:
    message = generate_request(TEXT, params, model=MODEL, request_id="", timeout_s=None)
    for name, value in options.items():
        if isinstance(value, pb.Resumption):
            message.resume.CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


async def stream(server: Server, message: pb.GenerateRequest, answer: Answer) -> list[pb.GenerateChunk]:
    chunks = [chunk async for chunk in server.grpc.GenerateStream(message)]
    for chunk in chunks:
        answer.take(chunk)
    return chunks


async def refusal(server: Server, message: pb.GenerateRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as refused:
        await stream(server, message, Answer(message.sampling.n or 1))
    return refused.value


async def with_stop_string(server: Server) -> SamplingParams:
    """A stop string of several characters that this seed's answer comes to, across tokens."""
    params = replace(BASE, seed=12, max_tokens=40)
    answer = Answer(1)
    await stream(server, request(params), answer)
    text = answer.sequences[0].text
    return replace(params, stop=(text[len(text) // 2 :][:5], "never to be found"))


@pytest.mark.parametrize("name", [*PARAMS, "stop string"])
async def test_every_seam(server: Server, name: str) -> None:
    params = await with_stop_string(server) if name == "stop string" else PARAMS[name]
    whole = Answer(params.n)
    chunks = await stream(server, request(params), whole)
    if name == "stop string":
        assert whole.sequences[0].stop_string == params.stop[0]
    for seam in range(len(chunks)):
        answer = Answer(params.n)
        for chunk in chunks[:seam]:
            answer.take(chunk)
        message = request(params, resume=answer.resumption(server.weights), attempt=1)
        if answer.sequences[0].token_ids:
            message.sampling.ClearField("prompt_logprobs")
            message.sampling.ClearField("prompt_logprobs_start")
        await stream(server, message, answer)
        answer.assert_equals(whole)
    await server.settled()


async def test_a_resumption_that_cannot_be_is_refused_by_name(server: Server) -> None:
    params = PARAMS["sampled"]
    whole = Answer(1)
    await stream(server, request(params), whole)
    tokens = list(whole.sequences[0].token_ids)

    def resume(*sequences: list[int], weights: str = server.weights, finished: bool = False) -> pb.Resumption:
        held = [pb.ResumedSequence(token_ids=each, finished=finished) for each in sequences]
        return pb.Resumption(weight_version=weights, sequences=held)

    with_stop = await with_stop_string(server)
    stopped = Answer(1)
    await stream(server, request(with_stop), stopped)
    cases = [
        (request(params, resume=resume()), "has no sequences"),
        (request(params, resume=resume([1], [2])), "has 2 sequences, but n is 1"),
        (request(params, resume=resume(tokens, finished=True)), "every sequence is finished"),
        (request(params, resume=resume(tokens)), "would have ended at 24"),
        (request(params, resume=resume([1, 100_000])), "100000 is not in the vocabulary"),
        (request(params, resume=resume([1, -1])), "-1 is not in the vocabulary"),
        (request(replace(params, seed=None), resume=resume([1])), "needs the seed"),
        (request(PARAMS["stop tokens"], resume=resume([61] * 15)), "had ended it"),
        (request(with_stop, resume=resume(list(stopped.sequences[0].token_ids))), "holds a stop string"),
    ]
    for message, problem in cases:
        refused = await refusal(server, message)
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert problem in refused.details()
        assert dict(refused.trailing_metadata())["error-field"] == "resume"
    other = await refusal(server, request(params, resume=resume([1], weights="w-older")))
    assert other.code() is grpc.StatusCode.UNAVAILABLE
    assert "w-older" in other.details()
    with pytest.raises(grpc.RpcError) as unary:
        await server.grpc.Generate(request(params, resume=resume([1])))
    assert unary.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await refusal(server, request(params, attempt=-1))).code() is grpc.StatusCode.INVALID_ARGUMENT
    await server.settled()


async def test_a_later_attempt_takes_the_place_of_an_earlier_one(server: Server) -> None:
    params = replace(BASE, seed=13, max_tokens=400)
    expected = Answer(1)
    await stream(server, request(params), expected)
    for _ in range(5):
        first, answer = aiter(server.grpc.GenerateStream(request(params, request_id="mine", attempt=2))), Answer(1)
        for _ in range(3):
            answer.take(await anext(first))
        for attempt in (0, 1, 2):
            refused = await refusal(server, request(params, request_id="mine", attempt=attempt))
            assert refused.code() is grpc.StatusCode.ALREADY_EXISTS
            assert dict(refused.trailing_metadata())["error-code"] == "request_exists"
        await stream(
            server, request(params, request_id="mine", attempt=3, resume=answer.resumption(server.weights)), answer
        )
        answer.assert_equals(expected)
        with pytest.raises(grpc.RpcError) as ended:
            async for _ in first:
                pass
        assert ended.value.code() is grpc.StatusCode.CANCELLED
        assert "attempt 3 of request mine took the place" in ended.value.details()
    response = await server.http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "request_id": "mine"})
    assert response.status_code == 200, "the id is free again"


class CutServicer(InferenceServicer):
    """Loses its connections: after a few pieces, at random, as HAProxy does when a replica is gone."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.service)
        self.rng = random.Random(0)
        self.pieces = (0, 6)
        self.cuts_left = 5
        self.requests: list[pb.GenerateRequest] = []
        self.full_once = False

    async def GenerateStream(self, request: bytes, grpc_context: Any) -> AsyncIterator[pb.GenerateChunk]:
        self.requests.append(pb.GenerateRequest.FromString(request))
        if self.full_once and self.requests[-1].HasField("resume"):
            self.full_once = False
            grpc_context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            grpc_context.set_trailing_metadata([("error-code", "over_capacity"), ("retry-after-ms", "10")])
            return
        pieces = self.rng.randint(*self.pieces) if self.cuts_left else None
        async with contextlib.aclosing(super().GenerateStream(request, grpc_context)) as chunks:
            async for chunk in chunks:
                if pieces == 0:
                    self.cuts_left -= 1
                    begun = grpc.StatusCode.CANCELLED if self.rng.random() < 0.5 else grpc.StatusCode.UNAVAILABLE
                    grpc_context.set_code(begun)
                    return
                pieces = None if pieces is None else pieces - 1
                yield chunk

    async def Generate(self, request: bytes, grpc_context: Any) -> pb.GenerateResponse:
        self.requests.append(pb.GenerateRequest.FromString(request))
        if self.cuts_left:
            self.cuts_left -= 1
            grpc_context.set_code(grpc.StatusCode.UNAVAILABLE)
            return pb.GenerateResponse()
        return await super().Generate(request, grpc_context)


@pytest_asyncio.fixture(loop_scope="module")
async def cut(server: Server) -> AsyncIterator[tuple[CutServicer, str]]:
    servicer, grpc_server = CutServicer(server), grpc.aio.server()
    add_inference_to_server(as_serve_does(servicer), grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    yield servicer, f"127.0.0.1:{port}"
    await grpc_server.stop(None)
    await server.settled()


async def collect(kind: type, target: str, params: SamplingParams | None, **options: Any) -> list[Chunk]:
    if kind is AsyncClient:
        async with AsyncClient(target) as client:
            return [chunk async for chunk in client.stream(TEXT, params, model=MODEL, **options)]

    def wait() -> list[Chunk]:
        with Client(target) as client:
            return list(client.stream(TEXT, params, model=MODEL, **options))

    return await asyncio.to_thread(wait)


def joined(chunks: list[Chunk], n: int) -> list[tuple[str, list[int], FinishReason | None]]:
    return [
        (
            "".join(chunk.text for chunk in chunks if chunk.index == index),
            [token_id for chunk in chunks if chunk.index == index for token_id in chunk.token_ids],
            next(chunk.finish_reason for chunk in chunks if chunk.index == index and chunk.finish_reason),
        )
        for index in range(n)
    ]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("name", PARAMS)
async def test_a_client_does_not_see_the_cuts(
    server: Server, cut: tuple[CutServicer, str], kind: type, name: str
) -> None:
    servicer, target = cut
    params = PARAMS[name]
    servicer.cuts_left = 0
    expected = await collect(kind, target, params)
    servicer.cuts_left, servicer.full_once = 5, True
    chunks = await collect(kind, target, params, request_id="cut", timeout_s=30.0)
    assert servicer.cuts_left < 5, "nothing was cut"
    assert joined(chunks, params.n) == joined(expected, params.n)
    assert [chunk.usage.completion for chunk in chunks if chunk.usage] == [expected[-1].usage.completion]
    prompts = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs]
    assert len(prompts) == (1 if params.prompt_logprobs is not None else 0)
    if params.logprobs is not None:
        assert sum(len(chunk.logprobs or ()) for chunk in chunks) == params.max_tokens
    sent = servicer.requests[1:]
    assert [each.attempt for each in sent] == list(range(len(sent)))
    assert {each.request_id for each in sent} == {"cut"}
    timeouts = [each.timeout_ms for each in sent]
    assert timeouts == sorted(timeouts, reverse=True)
    assert timeouts[0] <= 30_000


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_without_a_seed_one_is_drawn_for_all_attempts(cut: tuple[CutServicer, str], kind: type) -> None:
    servicer, target = cut
    seeds = []
    for _ in range(2):
        servicer.cuts_left, servicer.pieces = 3, (1, 4)
        servicer.requests.clear()
        chunks = await collect(kind, target, replace(BASE, max_tokens=64))
        assert sum(len(chunk.token_ids) for chunk in chunks) == 64
        # A chunk holds all tokens that there are by then, so that under load an answer may end before the last cut.
        assert servicer.cuts_left < 3, "nothing was cut"
        assert len(servicer.requests) == 4 - servicer.cuts_left
        assert len({each.request_id for each in servicer.requests}) == 1
        (seed,) = {each.sampling.seed for each in servicer.requests}
        seeds.append(seed)
    assert seeds[0] != seeds[1]


async def test_a_whole_answer_is_asked_for_again(cut: tuple[CutServicer, str]) -> None:
    servicer, target = cut
    servicer.cuts_left = 2
    async with AsyncClient(target) as client:
        answer = await client.generate(TEXT, PARAMS["sampled"], model=MODEL)
    assert len(answer.outputs[0].token_ids) == 24
    assert [each.attempt for each in servicer.requests] == [0, 1, 2]
    assert len({each.request_id for each in servicer.requests}) == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_it_gives_up(cut: tuple[CutServicer, str], kind: type) -> None:
    servicer, target = cut
    servicer.cuts_left, servicer.pieces = 1000, (1, 1)
    with pytest.raises(EngineUnavailableError):
        await collect(kind, target, BASE)
    assert len(servicer.requests) == MAX_CUTS + 1
    servicer.requests.clear()
    servicer.pieces = (0, 0)
    began = asyncio.get_running_loop().time()
    with pytest.raises(EngineUnavailableError):
        await collect(kind, target, BASE, timeout_s=1.0)
    assert 0.3 < asyncio.get_running_loop().time() - began < 1.5
    assert len(servicer.requests) < 12, "it waits longer each time"
    with pytest.raises(InvalidRequestError):
        await collect(kind, target, replace(BASE, max_tokens=100_000))


async def test_a_full_queue_is_the_callers_matter_until_the_answer_has_begun(
    cut: tuple[CutServicer, str], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, target = cut

    async def full(call: object) -> object:
        raise CapacityError("full", retry_after_s=0.01)

    monkeypatch.setattr(server.service, "prepare", full)
    with pytest.raises(CapacityError):
        await collect(AsyncClient, target, BASE)


async def test_an_abort_is_not_retried(cut: tuple[CutServicer, str], server: Server) -> None:
    servicer, target = cut
    servicer.cuts_left = 0
    async with AsyncClient(target) as client:
        chunks = client.stream(TEXT, replace(BASE, max_tokens=400), model=MODEL, request_id="r")
        await anext(chunks)
        assert await client.abort("r")
        with pytest.raises(RequestAbortedError):
            async for _ in chunks:
                pass
    assert len(servicer.requests) == 1
