"""Bad input is refused by name before anything is allocated, on both faces, and the server goes on."""

import asyncio
import time

import grpc
import httpx
import pytest
import pytest_asyncio

from rayllm.proto.v1 import inference_pb2 as pb
from tests.e2e.bad_input import BAD, MODEL, grpc_request, http_body

pytestmark = pytest.mark.asyncio(loop_scope="module")

by_case = pytest.mark.parametrize(("field", "bad"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def goes_on(server, request):
    """Nothing was queued or counted as accepted, and the next good request is answered."""
    before = server.engine.stats()
    yield
    if request.node.name == "test_what_asks_for_nothing_is_no_error":
        return
    after = server.engine.stats()
    assert (after.steps, after.prompt_tokens, after.free_blocks) == (
        before.steps,
        before.prompt_tokens,
        before.free_blocks,
    )
    response = await server.http.post("/v1/completions", content=http_body({}))
    assert response.status_code == 200
    await server.settled()


@by_case
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_http(server, field, bad, stream):
    response = await server.http.post("/v1/completions", content=http_body(bad | {"stream": stream}))
    assert response.status_code == (404 if field == "model" else 400)
    error = response.json()["error"]
    assert error["param"] == field
    assert error["code"] == ("model_not_found" if field == "model" else "invalid_request")
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]
    assert len(error["message"]) < 500


@by_case
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_grpc(server, field, bad, method):
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await server.generate(method, grpc_request(bad))
    code = grpc.StatusCode.NOT_FOUND if field == "model" else grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.value.code() is code
    assert field in refusal.value.details()
    trailers = dict(refusal.value.trailing_metadata())
    assert trailers["error-code"] == ("model_not_found" if field == "model" else "invalid_request")
    assert trailers["error-field"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b'{"model": "tiny", "prompt": "a"', "body"),
        (b"[1, 2]", "body"),
        (b'"text"', "body"),
        (b"\xff\xfe\x00", "body"),
        (b"[" * 100_000, "body"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "body"),
        (b'{"model": "tiny", "prompt": "lone \\ud800"}', "prompt"),
        (b'{"model": "tiny", "prompt": ["fine", "lone \\udfff"]}', "prompt"),
        (b'{"model": "tiny"}', "prompt"),
        (b'{"prompt": "a"}', "model"),
        (b'{"model": 3, "prompt": "a"}', "model"),
        (b'{"model": "tiny", "prompt": 3}', "prompt"),
        (b'{"model": "tiny", "prompt": [1, "a"]}', "prompt"),
        (b'{"model": "tiny", "prompt": [true]}', "prompt"),
        (b'{"model": "tiny", "prompt": [1.5]}', "prompt"),
        (b'{"model": "tiny", "prompt": [[]]}', "prompt"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": "4"}', "max_tokens"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 4.5}', "max_tokens"),
        (b'{"model": "tiny", "prompt": "a", "n": true}', "n"),
        (b'{"model": "tiny", "prompt": "a", "temperature": "hot"}', "temperature"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "temperature"),
        (b'{"model": "tiny", "prompt": "a", "seed": 99999999999999999999}', "seed"),
        (b'{"model": "tiny", "prompt": "a", "stop": {"a": 1}}', "stop"),
        (b'{"model": "tiny", "prompt": "a", "logit_bias": {"a": 1}}', "logit_bias"),
        (b'{"model": "tiny", "prompt": "a", "logit_bias": {"1": "2"}}', "logit_bias.1"),
        (b'{"model": "tiny", "prompt": "a", "stream": 1}', "stream"),
        (b'{"model": "tiny", "prompt": "a", "temprature": 1}', "temprature"),
        (b'{"model": "tiny", "prompt": "a", "suffix": "b"}', "suffix"),
        (b'{"model": "tiny", "prompt": "a", "best_of": 2}', "best_of"),
        (b'{"model": "tiny", "prompt": "a", "user": "me"}', "user"),
        (b'{"model": "tiny", "prompt": "a", "stream_options": {"include_usage": true}}', "stream_options"),
        (b'{"model": "tiny", "prompt": "a", "stream": true, "stream_options": {"x": 1}}', "stream_options.x"),
        (b'{"model": "tiny", "prompt": "a", "messages": []}', "messages"),
    ],
    ids=lambda value: value[:60].decode("latin-1") if isinstance(value, bytes) else "",
)
async def test_malformed_bodies(server, body, field):
    response = await server.http.post("/v1/completions", content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field, error
    assert "Traceback" not in response.text
    assert "pydantic" not in response.text


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a" * 10_000_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "ab " * 300}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
        ({"prompt": "x"}, "prompt"),
    ],
    ids=str,
)
async def test_chat(server, options, field):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]} | options
    response = await server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field, response.text


async def test_what_asks_for_nothing_is_no_error(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": None}
    body |= {"response_format": {"type": "text"}, "store": False, "service_tier": "auto", "tool_choice": "none"}
    response = await server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/completions", 405), ("POST", "/v2/x", 404), ("GET", "/", 404)]
)
async def test_routes(server, method, path, status):
    response = await server.http.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]
    assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize("headers", [b"content-length: 99999999999", b"transfer-encoding: chunked"])
async def test_a_body_over_the_bound_is_refused_before_it_ends(server, headers):
    address = httpx.URL(server.url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n\r\n")
    if b"chunked" in headers:
        writer.write((b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 17)  # 17 MiB and no end
    status = await reader.readline()
    body = await reader.read(4096)
    writer.close()
    assert b" 413 " in status
    assert b"payload_too_large" in body


async def test_tokenize_and_detokenize(server):
    for path, body, field in [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [264]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ]:
        response = await server.http.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
    assert (await server.http.post("/tokenize", json={"prompt": "a", "model": "x"})).status_code == 404


@pytest.mark.parametrize("method", ["Generate", "Abort", "Tokenize", "Detokenize", "ModelInfo", "Load"])
@pytest.mark.parametrize("message", [b"\xff\xff\xff\xff", b"\x0a\xff\x01", b"\x0a\x02\xed\xa0", b"\xf8\x7f\x01"])
async def test_malformed_protobuf(server, method, message):
    """Not protobuf at all, a length past the end, invalid UTF-8, and a field number that nobody knows."""
    call = server.channel.unary_unary(f"/rayllm.v1.Inference/{method}")
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call(message)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in refusal.value.details()


async def test_unknown_fields_of_inner_messages(server):
    sampling = b"\x32\x03\xf8\x7f\x01"  # {2047: 1}
    message = grpc_request({}).SerializeToString() + sampling
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await server.channel.unary_unary("/rayllm.v1.Inference/Generate")(message)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(refusal.value.trailing_metadata())["error-field"] == "sampling"


async def test_grpc_without_a_prompt(server):
    for request in (pb.GenerateRequest(model=MODEL), pb.GenerateRequest(model=MODEL, chat=pb.Chat())):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await server.grpc.Generate(request)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_refusals_are_fast(server):
    body = http_body({"prompt": "a" * 10_000_000})
    started = time.monotonic()
    await server.http.post("/v1/completions", content=body)
    assert time.monotonic() - started < 2.0
