"""The gRPC face: the same tokens as over HTTP, and the messages' own corners."""

import json

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rayllm.core.errors import EngineUnavailableError
from rayllm.proto.v1 import inference_pb2 as pb

MODEL = "tiny"

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The same parameters as HTTP's extra fields and as protobuf fields.
SAMPLINGS = [
    {"temperature": 0, "max_tokens": 24, "ignore_eos": True},
    {"temperature": 0.9, "seed": 42, "max_tokens": 24, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.3, "seed": -5, "n": 3, "max_tokens": 16, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 0.7, "seed": 1, "max_tokens": 16, "logit_bias": {"70": 50.0}, "presence_penalty": -0.5},
    {"temperature": 0.8, "seed": 2, "max_tokens": 40, "min_tokens": 30, "stop_token_ids": [67, 68, 69]},
    {"temperature": 0.8, "seed": 2, "max_tokens": 12, "logprobs": 3, "prompt_logprobs": 2},
]
TEXT = "서울 and the 🙂"


def request(sampling: dict, **options) -> pb.GenerateRequest:
    message = pb.GenerateRequest(model=MODEL, **options)
    json_format.ParseDict({"sampling": sampling}, message)
    return message


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=json.dumps)
async def test_equals_http_token_for_token(server, sampling):
    over_grpc = await server.grpc.Generate(request(sampling, text=TEXT))
    body = {"model": MODEL, "prompt": TEXT, "return_token_ids": True} | sampling
    over_http = (await server.http.post("/v1/completions", json=body)).json()
    assert [list(output.token_ids) for output in over_grpc.outputs] == [c["token_ids"] for c in over_http["choices"]]
    assert [output.text for output in over_grpc.outputs] == [c["text"] for c in over_http["choices"]]
    reasons = [pb.FinishReason.Name(o.finish_reason).removeprefix("FINISH_REASON_").lower() for o in over_grpc.outputs]
    assert reasons == [c["finish_reason"] for c in over_http["choices"]]
    assert over_grpc.usage.prompt_tokens == over_http["usage"]["prompt_tokens"]
    assert over_grpc.usage.completion_tokens == over_http["usage"]["completion_tokens"]
    assert over_grpc.weight_version == over_http["system_fingerprint"] == server.weights
    if "logprobs" in sampling:
        mine, theirs = over_grpc.outputs[0].logprobs, over_http["choices"][0]["logprobs"]
        assert [p.logprob for p in mine] == pytest.approx(theirs["token_logprobs"], abs=1e-5)
        prompt = over_http["choices"][0]["prompt_logprobs"]
        assert prompt[0] is None
        assert [p.token_id for p in over_grpc.prompt_logprobs] == [p["token_id"] for p in prompt[1:]]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=json.dumps)
async def test_stream_equals_the_whole_answer(server, sampling):
    whole = await server.grpc.Generate(request(sampling, text=TEXT))
    rebuilt = [pb.Completion(index=i) for i in range(len(whole.outputs))]
    prompt_logprobs: list[pb.TokenLogprobs] = []
    chunks = [chunk async for chunk in server.grpc.GenerateStream(request(sampling, text=TEXT, request_id="mine"))]
    for chunk in chunks:
        assert chunk.request_id == "mine"
        assert chunk.weight_version == server.weights
        output = rebuilt[chunk.index]
        output.text += chunk.text
        output.token_ids.extend(chunk.token_ids)
        output.logprobs.extend(chunk.logprobs)
        output.finish_reason = chunk.finish_reason
        if chunk.HasField("stop_token_id"):
            output.stop_token_id = chunk.stop_token_id
        prompt_logprobs += chunk.prompt_logprobs
    assert rebuilt == list(whole.outputs)
    assert prompt_logprobs == list(whole.prompt_logprobs)
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


async def test_chat_equals_http(server):
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "안녕"}]
    chat = pb.Chat(messages=[pb.Message(**message) for message in messages])
    over_grpc = await server.grpc.Generate(request({"temperature": 0, "max_tokens": 12}, chat=chat))
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    over_http = (await server.http.post("/v1/chat/completions", json=body)).json()
    assert list(over_grpc.outputs[0].token_ids) == over_http["choices"][0]["token_ids"]
    assert over_grpc.outputs[0].text == over_http["choices"][0]["message"]["content"]


async def test_defaults(server):
    completion = await server.grpc.Generate(request({"ignore_eos": True}, text="a"))
    assert completion.usage.completion_tokens == 16
    chat = pb.Chat(messages=[pb.Message(role="user", content="a" * 440)])
    answer = await server.grpc.Generate(request({"ignore_eos": True}, chat=chat))
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 512


async def test_stop_string_is_named(server):
    free = await server.grpc.Generate(request({"temperature": 0, "max_tokens": 30, "ignore_eos": True}, text="xyz"))
    stop = free.outputs[0].text[9:12]
    sampling = {"temperature": 0, "max_tokens": 30, "ignore_eos": True, "stop": [stop]}
    stopped = await server.grpc.Generate(request(sampling, text="xyz"))
    assert stopped.outputs[0].stop_string == stop
    assert stopped.outputs[0].finish_reason == pb.FINISH_REASON_STOP


async def test_tokenize_detokenize_model_info_and_load(server):
    tokens = await server.grpc.Tokenize(pb.TokenizeRequest(model=MODEL, text=TEXT))
    assert list(tokens.token_ids) == server.engine.tokenizer.encode(TEXT)
    text = await server.grpc.Detokenize(pb.DetokenizeRequest(model=MODEL, token_ids=tokens.token_ids))
    assert text.text == TEXT
    info = await server.grpc.ModelInfo(pb.ModelInfoRequest())
    assert (info.model, info.weight_version, info.max_model_len) == (MODEL, server.weights, 512)
    assert set(info.eos_token_ids) == server.engine.tokenizer.eos_token_ids
    assert info.HasField("bos_token_id") == (server.engine.tokenizer.bos_token_id is not None)
    assert info.eos_token_id == server.engine.tokenizer.eos_token_id
    load = await server.grpc.Load(pb.LoadRequest())
    stats = server.engine.stats()
    assert (load.running, load.total_blocks, load.steps) == (0, stats.total_blocks, stats.steps)
    for call in (
        server.grpc.Tokenize(pb.TokenizeRequest(model="x", text="a")),
        server.grpc.Detokenize(pb.DetokenizeRequest(model="x")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health(server):
    health = health_pb2_grpc.HealthStub(server.channel)
    for service in ("", "rayllm.v1.Inference"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await health.Check(health_pb2.HealthCheckRequest(service="unknown"))
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
    for service, status in (("", "SERVING"), ("unknown", "SERVICE_UNKNOWN")):
        watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
        first = await anext(aiter(watch))
        assert health_pb2.HealthCheckResponse.ServingStatus.Name(first.status) == status
        watch.cancel()


async def test_health_is_the_engines(server, monkeypatch):
    def stalled() -> None:
        raise EngineUnavailableError("no step was completed for 130 s although there is work")

    monkeypatch.setattr(server.engine, "check_health", stalled)
    answer = await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    response = await server.http.get("/health")
    assert response.status_code == 503
    assert "no step" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1
