import pytest

from rayllm.core.errors import InvalidRequestError
from rayllm.core.limits import ModelLimits
from rayllm.core.types import SamplingParams

LIMITS = ModelLimits(max_model_len=10, vocab_size=50, max_request_tokens=64)
SMALL_CACHE = ModelLimits(max_model_len=100, vocab_size=50, max_request_tokens=8)


def problem(limits, prompt, *, field, **params):
    with pytest.raises(InvalidRequestError) as caught:
        limits.check(prompt, SamplingParams(**params))
    assert caught.value.field == field
    assert len(str(caught.value)) < 200
    return caught.value.problem


def test_what_just_fits():
    LIMITS.check([1], SamplingParams(max_tokens=9))
    LIMITS.check([0, 49] * 4 + [3], SamplingParams(max_tokens=1))
    LIMITS.check((1,) * 9, SamplingParams(max_tokens=None))
    LIMITS.check([1], SamplingParams(max_tokens=None, min_tokens=9))
    LIMITS.check([1], SamplingParams(max_tokens=1, stop_token_ids=(0, 49), logit_bias={0: 1.0, 49: 1.0}))
    SMALL_CACHE.check([1] * 5, SamplingParams(max_tokens=3))
    SMALL_CACHE.check([1] * 7, SamplingParams(max_tokens=None))


def test_an_empty_prompt():
    assert "empty" in problem(LIMITS, [], field="prompt")


def test_a_prompt_longer_than_the_context_names_both_numbers():
    assert problem(LIMITS, [1] * 11, field="prompt", max_tokens=1) == "11 tokens, but the context holds 10"


@pytest.mark.parametrize("max_tokens", [1, None])
def test_a_prompt_that_leaves_no_room(max_tokens):
    assert "no room" in problem(LIMITS, [1] * 10, field="prompt", max_tokens=max_tokens)
    assert "no room" in problem(SMALL_CACHE, [1] * 8, field="prompt", max_tokens=max_tokens)


def test_an_answer_longer_than_what_is_left():
    text = problem(LIMITS, [1] * 4, field="max_tokens", max_tokens=7)
    assert text == "7 after a prompt of 4 tokens is 11, but the context holds 10"
    text = problem(LIMITS, [1] * 4, field="min_tokens", max_tokens=None, min_tokens=7)
    assert "min_tokens" not in text
    assert "7 after a prompt of 4 tokens is 11" in text


def test_more_than_the_kv_cache_can_hold():
    assert problem(SMALL_CACHE, [1] * 9, field="prompt") == "9 tokens, but the KV cache of this server holds 8"
    assert "is 9, but the KV cache" in problem(SMALL_CACHE, [1] * 5, field="max_tokens", max_tokens=4)


@pytest.mark.parametrize("token_id", [-1, 50, 1 << 31, 1 << 64, -(10**5000)], ids=lambda value: value.bit_length())
def test_token_ids_outside_the_vocabulary(token_id):
    text = problem(LIMITS, [1, 2, token_id], field="prompt", max_tokens=1)
    assert "vocabulary of 50" in text
    assert "position 2" in text


@pytest.mark.parametrize("token_id", [True, 1.0, "1", None, [1], float("nan")], ids=repr)
def test_token_ids_that_are_no_integers(token_id):
    assert "not an integer" in problem(LIMITS, [1, token_id], field="prompt", max_tokens=1)


def test_text_is_no_list_of_ids():
    problem(LIMITS, "hello", field="prompt", max_tokens=1)


def test_ids_in_parameters_outside_the_vocabulary():
    assert "token id 50" in problem(LIMITS, [1], field="stop_token_ids", max_tokens=1, stop_token_ids=(3, 50))
    assert "token id 77" in problem(LIMITS, [1], field="logit_bias", max_tokens=1, logit_bias={3: 1.0, 77: 1.0})


def test_the_length_is_checked_before_any_id_is_looked_at():
    assert "1000000000000 tokens" in problem(LIMITS, range(10**12), field="prompt", max_tokens=1)
