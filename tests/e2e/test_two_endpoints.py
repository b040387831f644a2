"""Two endpoints on one machine: each answers for its own model only."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.proto.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.replicas import Replicas, ask, running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAMES = ("one", "two")
REQUESTS = 24


def _over_grpc(endpoint: Replicas, name: str) -> str:
    request = pb.GenerateRequest(model=name, text="x", sampling=pb.SamplingParams(max_tokens=2, ignore_eos=True))
    with grpc.insecure_channel(endpoint.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        return InferenceStub(channel).Generate(request).model


def test_each_answers_for_its_own_model(tiny_model: Path) -> None:
    sections = [{"model": {"model": str(tiny_model)}, "serve": {"model_name": name}} for name in NAMES]
    with running(sections[0]) as one, running(sections[1]) as two, ThreadPoolExecutor(8) as threads:
        for endpoint, name in zip((one, two), NAMES, strict=True):
            assert ask(endpoint.url, "x", model=name)["model"] == name
            answered = list(threads.map(lambda _, e=endpoint, n=name: _over_grpc(e, n), range(REQUESTS)))
            assert answered == [name] * REQUESTS
