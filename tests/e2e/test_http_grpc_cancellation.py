"""Whatever ends a request early, its blocks are free within two steps; what cannot be taken is refused at once."""

import asyncio
import contextlib

import grpc
import pytest

from rayllm.proto.v1 import inference_pb2 as pb

MODEL = "tiny"
LONG = {"max_tokens": 450, "ignore_eos": True, "temperature": 0.0}

pytestmark = pytest.mark.asyncio(loop_scope="module")


def body(**options) -> dict:
    return {"model": MODEL, "prompt": "a long answer"} | LONG | options


def request(**options) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=MODEL, text="a long answer", sampling=pb.SamplingParams(**LONG), **options)


async def test_http_client_leaves_a_stream(server):
    async with server.http.stream("POST", "/v1/completions", json=body(stream=True, n=3)) as response:
        await anext(response.aiter_bytes())
        assert server.engine.stats().running == 3
    while server.engine.stats().running:
        await asyncio.sleep(0.001)
    await server.settled()
    assert server.engine.stats().generated_tokens < 3 * 450


@pytest.mark.parametrize("options", [{}, {"prompt": ["one", "two", "three"]}, {"stream": True}], ids=str)
async def test_http_client_leaves_before_the_answer(server, options):
    task = asyncio.create_task(server.http.post("/v1/completions", json=body(**options)))
    await server.running()
    task.cancel()
    while server.engine.stats().running:
        await asyncio.sleep(0.001)
    await server.settled()


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_grpc_client_cancels(server, method):
    call = getattr(server.grpc, method)(request())
    if method == "GenerateStream":
        await anext(aiter(call))
    await server.running()
    call.cancel()
    while server.engine.stats().running:
        await asyncio.sleep(0.001)
    await server.settled()


async def test_grpc_clients_own_deadline(server):
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await server.grpc.Generate(request(), timeout=0.1)
    assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    while server.engine.stats().running:
        await asyncio.sleep(0.001)
    await server.settled()


@pytest.mark.parametrize("stream", [False, True])
async def test_http_deadline(server, stream):
    """Eight answers, so that a stream has begun by then also on a busy machine, and none has ended on a quick one."""
    response = await server.http.post("/v1/completions", json=body(timeout_ms=400, n=8, stream=stream))
    if stream:
        assert response.status_code == 200
        events = response.text.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert '"code":"deadline_exceeded"' in events[-2]
    else:
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
    await server.settled()


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_grpc_deadline(server, method):
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await server.generate(method, request(timeout_ms=60))
    assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert dict(refusal.value.trailing_metadata())["error-code"] == "deadline_exceeded"
    await server.settled()


async def test_abort_reaches_both_faces(server):
    over_grpc = server.grpc.Generate(request(request_id="over-grpc"))
    over_http = asyncio.create_task(
        server.http.post("/v1/completions", json=body(request_id="over-http", prompt=["x", "y"]))
    )
    await server.running(3)
    for request_id in ("over-grpc", "over-http"):
        assert (await server.grpc.Abort(pb.AbortRequest(request_id=request_id))).aborted
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await over_grpc
    assert refusal.value.code() is grpc.StatusCode.CANCELLED
    response = await over_http
    assert response.status_code == 499
    assert response.json()["error"]["code"] == "aborted"
    assert not (await server.grpc.Abort(pb.AbortRequest(request_id="over-grpc"))).aborted
    await server.settled()


async def test_a_live_request_id_is_refused(server):
    first = server.grpc.GenerateStream(request(request_id="twice"))
    await anext(aiter(first))
    response = await server.http.post("/v1/completions", json=body(request_id="twice"))
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "request_exists"
    first.cancel()
    while server.engine.stats().running:
        await asyncio.sleep(0.001)


@pytest.mark.asyncio(loop_scope="function")
async def test_a_full_queue_refuses_at_once(narrow_server):
    server = narrow_server
    running = asyncio.create_task(server.http.post("/v1/completions", json=body()))
    await server.running()
    waiting = asyncio.create_task(server.http.post("/v1/completions", json=body(max_tokens=1)))
    while not server.engine.stats().waiting:
        await asyncio.sleep(0.001)
    for stream in (False, True):
        response = await server.http.post("/v1/completions", json=body(stream=stream))
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
    for method in ("Generate", "GenerateStream"):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await server.generate(method, request())
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(refusal.value.trailing_metadata())["retry-after-ms"]) > 0
    assert not running.done(), "what runs has not ended: no place was waited for"
    assert (await running).status_code == (await waiting).status_code == 200


@pytest.mark.asyncio(loop_scope="function")
async def test_an_engine_that_is_gone(narrow_server):
    server = narrow_server
    async with server.http.stream("POST", "/v1/completions", json=body(stream=True)) as streaming:
        chunks = streaming.aiter_text()
        events = await anext(chunks)
        await server.engine.close()
        events += "".join([chunk async for chunk in chunks])
    assert '"code":"unavailable"' in events
    assert events.endswith("data: [DONE]\n\n")
    response = await server.http.post("/v1/completions", json=body())
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await server.grpc.Generate(request())
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_bug_is_not_shown(server, monkeypatch):
    async def broken(generation):
        raise ZeroDivisionError("/secret/path")
        yield

    monkeypatch.setattr(server.service, "run", broken)
    response = await server.http.post("/v1/completions", json=body())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "secret" not in response.text
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await server.grpc.Generate(request())
    assert refusal.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in refusal.value.details()


async def test_many_clients_leave_at_random(server):
    async def leave(i: int) -> None:
        request = server.http.post("/v1/completions", json=body(stream=i % 2 == 0))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(request, 0.02 * (i % 5))

    await asyncio.gather(*(leave(i) for i in range(24)))
    while server.engine.stats().running or server.engine.stats().waiting:
        await asyncio.sleep(0.001)
    await server.settled()
