"""Weights that change under answers, as clients see it: an answer says which weights gave it, and it was those."""

from pathlib import Path

import grpc
import pytest

from rayllm.core.config import CacheConfig
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.models.weight_version import weight_version
from rayllm.proto.v1 import inference_pb2 as pb
from tests.checkpoints import retrained
from tests.e2e.conftest import MODEL, Server

PROMPT = "Once upon a time"
TOKENS = 200
EXTRA = {"ignore_eos": True, "return_token_ids": True}
BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return retrained(tiny_model, tmp_path_factory.mktemp("other") / "model", seed=1)


def offline(model: Path) -> list[int]:
    with LLM(str(model), cache=CacheConfig(num_blocks=100)) as llm:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        return llm.generate(PROMPT, params)[0].outputs[0].token_ids


async def test_each_answer_is_of_the_weights_that_it_names(server: Server, tiny_model: Path, other_model: Path) -> None:
    expected = {weight_version(model): offline(model) for model in (tiny_model, other_model)}
    old, new = expected
    over_http = await server.openai.completions.create(**BODY, extra_body=EXTRA, stream=True)
    sampling = pb.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    request = pb.GenerateRequest(model=MODEL, text=PROMPT, sampling=sampling)
    over_grpc = aiter(server.grpc.GenerateStream(request))
    begun = await anext(over_grpc)
    first = await anext(aiter(over_http))
    server.engine.use_weights(await server.engine.load_weights(other_model))
    assert server.engine.stats().running == 2, "both were to run on"

    whole = await server.http.post("/v1/completions", json={**BODY, **EXTRA})
    assert whole.headers["x-weight-version"] == whole.json()["system_fingerprint"] == new
    assert whole.json()["choices"][0]["token_ids"] == expected[new]
    assert over_http.response.headers["x-weight-version"] == old
    chunks = [first, *[chunk async for chunk in over_http]]
    assert {chunk.system_fingerprint for chunk in chunks} == {old}
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == expected[old]
    pieces = [begun, *[piece async for piece in over_grpc]]
    assert {piece.weight_version for piece in pieces} == {old}
    assert [token for piece in pieces for token in piece.token_ids] == expected[old]

    assert (await server.grpc.ModelInfo(pb.ModelInfoRequest())).weight_version == new
    assert f'rayllm_weights_info{{version="{new}"}} 1.0' in (await server.http.get("/metrics")).text

    for weights in (old, new):  # a client that lost its replica goes on with either, as long as they are held
        held = pb.ResumedSequence(token_ids=expected[weights][:40])
        request.resume.CopyFrom(pb.Resumption(weight_version=weights, sequences=[held]))
        rest = [token async for piece in server.grpc.GenerateStream(request) for token in piece.token_ids]
        assert rest == expected[weights][40:]
    request.resume.weight_version = "w-unknown"
    with pytest.raises(grpc.RpcError) as refused:
        await server.grpc.GenerateStream(request).read()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    server.engine.use_weights(old)
