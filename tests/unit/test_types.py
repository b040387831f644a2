import math
import sys
from types import MappingProxyType

import pytest

from rayllm.core import types
from rayllm.core.errors import InvalidRequestError
from rayllm.core.types import SamplingParams

HUGE = 10**5000  # more digits than int -> str allows

INTEGERS = {  # field: (lowest, highest)
    "n": (1, types.MAX_N),
    "top_k": (0, 1 << 31),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "max_tokens": (1, types.MAX_TOKENS),
    "logprobs": (0, types.MAX_LOGPROBS),
    "prompt_logprobs": (0, types.MAX_LOGPROBS),
}
FLOATS = {  # field: (lowest, highest, is the lowest itself allowed)
    "temperature": (0.0, 100.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 10.0, False),
    "frequency_penalty": (-2.0, 2.0, True),
    "presence_penalty": (-2.0, 2.0, True),
}
COLLECTIONS = ("stop", "stop_token_ids", "logprob_token_ids", "logit_bias")


def refused(**values: object) -> InvalidRequestError:
    """The error of values of which the first is at fault; it must name that one and stay short."""
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**values)
    assert caught.value.field == next(iter(values))
    assert len(str(caught.value)) < 200
    return caught.value


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_bounded_on_both_sides(name):
    low, high = INTEGERS[name]
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in (low - 1, high + 1, HUGE, -HUGE, 1 << 64):
        refused(**{name: value})


@pytest.mark.parametrize("name", [*INTEGERS, "min_tokens"])
@pytest.mark.parametrize("value", [True, 1.0, "1", b"1", [1], {}, math.nan, math.inf, object], ids=repr)
def test_integers_are_integers(name, value):
    assert "must be an integer" in refused(**{name: value}).problem


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_bounded_on_both_sides(name):
    low, high, low_allowed = FLOATS[name]
    assert getattr(SamplingParams(**{name: high}), name) == high
    assert getattr(SamplingParams(**{name: int(high)}), name) == high
    just_above = math.nextafter(low, math.inf)
    assert getattr(SamplingParams(**{name: just_above}), name) == just_above
    if low_allowed:
        assert getattr(SamplingParams(**{name: low}), name) == low
    else:
        refused(**{name: low})
    outside = (math.nextafter(low, -math.inf), math.nextafter(high, math.inf), HUGE, -HUGE, sys.float_info.max)
    for value in (*outside, math.nan, math.inf, -math.inf):
        refused(**{name: value})


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [True, None, "1.0", [1.0], 1j, object], ids=repr)
def test_numbers_are_numbers(name, value):
    assert "must be a number" in refused(**{name: value}).problem


def test_min_tokens_is_at_most_max_tokens():
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=types.MAX_TOKENS, max_tokens=None).min_tokens == types.MAX_TOKENS
    for values in ({"min_tokens": 6, "max_tokens": 5}, {"min_tokens": -1}, {"min_tokens": HUGE, "max_tokens": None}):
        refused(**values)


@pytest.mark.parametrize("name", ["seed", "max_tokens", "logprobs", "prompt_logprobs"])
def test_what_may_be_left_open(name):
    assert getattr(SamplingParams(**{name: None}), name) is None


@pytest.mark.parametrize("name", ["n", "top_k", "min_tokens", "ignore_eos", *COLLECTIONS])
def test_what_may_not_be_left_open(name):
    refused(**{name: None})


@pytest.mark.parametrize("value", [0, 1, "yes", 1.0, []], ids=repr)
def test_ignore_eos_is_a_bool(value):
    refused(ignore_eos=value)


@pytest.mark.parametrize("name", COLLECTIONS)
@pytest.mark.parametrize("value", [5, 1.5, True, b"ab", object(), iter(())], ids=lambda value: type(value).__name__)
def test_collections_are_collections(name, value):
    assert "must " in refused(**{name: value}).problem


def test_stop_strings():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    longest = "x" * types.MAX_STOP_STRING_CHARS
    assert SamplingParams(stop=[longest] * types.MAX_STOP_STRINGS).stop[-1] == longest
    for value in (
        "",
        [""],
        [longest + "x"],
        ["\ud800"],
        ["a", 1],
        ["a", None],
        {"a": 1},
        ["a"] * (types.MAX_STOP_STRINGS + 1),
    ):
        refused(stop=value)


def test_ten_thousand_stop_strings_are_counted_before_they_are_copied():
    class Counted(list):
        def __iter__(self):
            raise AssertionError("looked at before its length was checked")

    assert "10000 entries" in refused(stop=Counted(["a"] * 10_000)).problem
    assert "10000 entries" in refused(stop_token_ids=Counted(range(10_000))).problem


def test_stop_token_ids():
    assert SamplingParams(stop_token_ids=[0, (1 << 31) - 1]).stop_token_ids == (0, (1 << 31) - 1)
    assert len(SamplingParams(stop_token_ids=range(types.MAX_STOP_TOKEN_IDS)).stop_token_ids) == 256
    for value in ([-1], [1 << 31], [HUGE], [True], [1.0], ["1"], [None], "12", range(types.MAX_STOP_TOKEN_IDS + 1)):
        refused(stop_token_ids=value)


def test_logit_bias():
    assert SamplingParams(logit_bias={0: -100, 7: 100.0}).logit_bias == {0: -100, 7: 100.0}
    assert SamplingParams(logit_bias=MappingProxyType({1: 1.0})).logit_bias == {1: 1.0}
    bad = ({-1: 0.0}, {1 << 31: 0.0}, {HUGE: 0.0}, {"1": 0.0}, {True: 0.0}, {1.0: 0.0}, {None: 0.0})
    bad += ({1: 100.1}, {1: -100.1}, {1: math.nan}, {1: math.inf}, {1: "5"}, {1: None}, {1: True}, {1: HUGE})
    for value in (*bad, [(1, 1.0)], dict.fromkeys(range(types.MAX_LOGIT_BIAS + 1), 0.0)):
        refused(logit_bias=value)


def test_an_instance_stays_valid_when_its_sources_change():
    stop, bias = ["a"], {1: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("")
    bias[-1] = math.nan
    assert params.stop == ("a",)
    assert params.logit_bias == {1: 1.0}


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_what_belongs_together():
    refused(prompt_logprobs_start=2)
    refused(logprob_token_ids=(1,))
    for start in (0, -1, True, 1.5, HUGE):
        refused(prompt_logprobs_start=start, prompt_logprobs=0)
    params = SamplingParams(prompt_logprobs=0, prompt_logprobs_start=9, logprobs=0, logprob_token_ids=[4, 5])
    assert (params.prompt_logprobs_start, params.logprob_token_ids) == (9, (4, 5))
