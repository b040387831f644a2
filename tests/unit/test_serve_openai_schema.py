"""Whatever arrives over HTTP is either a valid call or refused by name; nothing of OpenAI's is overlooked."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import SamplingParams
from rayllm.serve.openai_schema import _NOT_OFFERED, ChatCompletionRequest, CompletionRequest, TokenizeRequest, parse
from rayllm.serve.prompts import Chat

GOOD = {
    CompletionRequest: {"model": "m", "prompt": "x"},
    ChatCompletionRequest: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
}
SCHEMAS = pytest.mark.parametrize("schema", list(GOOD))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def call(schema, **options):
    return parse(schema, json.dumps(GOOD[schema] | options).encode()).call()


def refusal(schema, body: bytes) -> str | None:
    """The field at fault; None for a valid call."""
    try:
        parse(schema, body).call()
    except InvalidRequestError as error:
        return error.field
    return None


@SCHEMAS
def test_every_field_of_the_openai_client_is_known(schema):
    params = {
        CompletionRequest: completion_create_params.CompletionCreateParamsBase,
        ChatCompletionRequest: chat_create_params.CompletionCreateParamsBase,
    }[schema]
    theirs = set(typing.get_type_hints(params)) | {"stream"}
    assert theirs - set(schema.model_fields) - set(_NOT_OFFERED) == set()


@SCHEMAS
def test_every_sampling_parameter_can_be_given(schema):
    mine = {field.name for field in dataclasses.fields(SamplingParams)}
    assert mine - set(schema.model_fields) == set()


@SCHEMAS
@pytest.mark.parametrize("name", sorted(_NOT_OFFERED))
def test_what_is_not_offered_is_refused_unless_it_asks_for_nothing(schema, name):
    assert call(schema, request_id="a", **{name: None}) == call(schema, request_id="a")
    for neutral in _NOT_OFFERED[name]:
        call(schema, **{name: neutral})
    for asks in ("anything", 2, True, {"a": 1}):
        if asks not in _NOT_OFFERED[name]:
            with pytest.raises(InvalidRequestError, match=f"^{name}: is not supported"):
                call(schema, **{name: asks})


@SCHEMAS
@given(body=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150, deadline=None)
def test_any_body(schema, body):
    assert refusal(schema, body) != ""


@SCHEMAS
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_any_value_of_any_field(schema, data):
    names = sorted({*schema.model_fields, *_NOT_OFFERED, "unheard_of"})
    name = data.draw(st.sampled_from(names))
    value = data.draw(JSON)
    field = refusal(schema, json.dumps(GOOD[schema] | {name: value}).encode())
    # Of two fields that do not go together either may be named.
    related = {
        "stream_options": "stream",
        "top_logprobs": "logprobs",
        "min_tokens": "max_tokens",
        "logprob_token_ids": "logprobs",
    }
    assert field is None or name.split("_")[0] in field or related.get(field) == name


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 128),
            "temperature": st.floats(0, 100),
            "top_p": st.floats(0.01, 1),
            "top_k": st.integers(0, 100),
            "min_p": st.floats(0, 1),
            "repetition_penalty": st.floats(0.1, 10),
            "frequency_penalty": st.floats(-2, 2),
            "presence_penalty": st.floats(-2, 2),
            "seed": st.integers(-(2**63), 2**63 - 1),
            "min_tokens": st.integers(0, 5),
            "stop": st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=10), max_size=4),
            "stop_token_ids": st.lists(st.integers(0, 1000), max_size=4),
            "ignore_eos": st.booleans(),
            "prompt_logprobs": st.integers(0, 20),
            "max_tokens": st.integers(5, 100),
        },
    )
)
@settings(max_examples=100, deadline=None)
def test_a_good_request_is_taken_as_it_is(options):
    for schema in GOOD:
        params = call(schema, **options).params
        for name, value in options.items():
            assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)


def test_defaults():
    completion = call(CompletionRequest)
    assert completion.params == SamplingParams()
    assert completion.prompts == ("x",)
    assert completion.request_id.startswith("cmpl-")
    chat = call(ChatCompletionRequest)
    assert chat.params == SamplingParams(max_tokens=None)
    assert chat.prompts == (Chat(({"role": "user", "content": "x"},)),)


def test_chat_logprobs_and_length():
    assert call(ChatCompletionRequest, logprobs=True).params.logprobs == 0
    assert call(ChatCompletionRequest, logprobs=True, top_logprobs=4).params.logprobs == 4
    assert call(ChatCompletionRequest, logprobs=False).params.logprobs is None
    assert call(ChatCompletionRequest, max_tokens=5, max_completion_tokens=5).params.max_tokens == 5


def test_tokenize_takes_either():
    assert parse(TokenizeRequest, b'{"prompt": "x"}').prompt == "x"
    with pytest.raises(InvalidRequestError, match="either"):
        parse(TokenizeRequest, b"{}")
