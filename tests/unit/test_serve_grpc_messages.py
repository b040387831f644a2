"""Any bytes are either a valid call or refused by name; no parameter is lost between protobuf and the engine."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import FinishReason, SamplingParams
from rayllm.proto.v1 import inference_pb2 as pb
from rayllm.serve.grpc_messages import _FINISH_REASONS, generate_call, parse


def refused_or_taken(data: bytes) -> str:
    """The field at fault, or the request's id."""
    try:
        return generate_call(parse(pb.GenerateRequest, data)).request_id
    except InvalidRequestError as error:
        return error.field


def test_messages_have_every_sampling_parameter():
    mine = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(pb.SamplingParams.DESCRIPTOR.fields_by_name) == mine
    # A sequence that ends by an error ends its request's stream with that error instead.
    assert set(_FINISH_REASONS) == {None, *FinishReason} - {FinishReason.ERROR}


def test_absent_is_not_zero():
    absent = generate_call(pb.GenerateRequest(model="m", text="x"))
    assert absent.params == SamplingParams()
    assert absent.timeout_ms is None
    assert (
        generate_call(pb.GenerateRequest(text="x", sampling=pb.SamplingParams(temperature=0))).params.temperature == 0
    )
    for zero in ({"n": 0}, {"top_p": 0}, {"max_tokens": 0}, {"repetition_penalty": 0}):
        with pytest.raises(InvalidRequestError, match=next(iter(zero))):
            generate_call(pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**zero)))
    chat = pb.Chat(messages=[pb.Message(role="user", content="x")])
    assert generate_call(pb.GenerateRequest(chat=chat)).params.max_tokens is None


@given(data=st.binary(max_size=100))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data):
    assert refused_or_taken(data)


@given(data=st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_sampling_params(data):
    message = pb.GenerateRequest(text="x").SerializeToString() + bytes([6 << 3 | 2, len(data)]) + data
    assert refused_or_taken(message)


def test_unknown_fields_are_refused_wherever_they_are():
    unknown = b"\xf8\x7f\x01"  # field 2047, a varint
    chat = pb.Chat(messages=[pb.Message(role="user", content="x")])
    chat.messages[0].MergeFromString(unknown)
    for request, where in (
        (pb.GenerateRequest.FromString(unknown), "GenerateRequest"),
        (pb.GenerateRequest(token_ids=pb.TokenIds.FromString(unknown)), "token_ids"),
        (pb.GenerateRequest(chat=chat), r"chat\.messages\[0\]"),
    ):
        with pytest.raises(InvalidRequestError, match=f"^{where}: field number 2047"):
            parse(pb.GenerateRequest, request.SerializeToString())
