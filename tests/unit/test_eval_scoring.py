"""Likelihood requests as tokens: lm-eval's golden vectors, and what the engine is asked."""

import pytest

from rayllm.core.errors import ConfigError
from rayllm.core.tokenizer import Tokenizer
from rayllm.eval.scoring import Span, SpanMaker, disjoint_windows, scoring_calls, strided_windows
from rayllm.eval.task import Loglikelihood, RollingLoglikelihood


def pairs(spans):
    return [(list(span.context), list(span.targets)) for span in spans]


class TestDisjointWindows:
    """Vectors of lm-eval 0.4.13's get_rolling_token_windows, made disjoint."""

    def test_one_token_of_context(self):
        assert pairs(disjoint_windows(range(10), -1, 4)) == [
            ([-1], [0, 1, 2, 3]),
            ([3], [4, 5, 6, 7]),
            ([5, 6, 7], [8, 9]),
        ]

    def test_three_tokens_of_context(self):
        assert pairs(disjoint_windows(range(10), -1, 4, min_context=3)) == [
            ([-1], [0, 1, 2, 3]),
            ([1, 2, 3], [4, 5]),
            ([3, 4, 5], [6, 7]),
            ([5, 6, 7], [8, 9]),
        ]

    @pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 5, 8, 9, 23])
    @pytest.mark.parametrize("window", [1, 4, 7])
    def test_every_token_once_and_never_too_long(self, num_tokens, window):
        spans = list(disjoint_windows(range(num_tokens), -1, window))
        assert [target for span in spans for target in span.targets] == list(range(num_tokens))
        assert all(len(span.context) + len(span.targets) - 1 <= window for span in spans)
        assert all(span.context for span in spans)


class TestStridedWindows:
    def test_scores_what_no_window_before_held(self):
        assert pairs(strided_windows(range(11), 6, 3)) == [
            ([0], [1, 2, 3, 4, 5]),
            ([3, 4, 5], [6, 7, 8]),
            ([6, 7, 8], [9, 10]),
        ]

    def test_a_stride_as_long_as_the_window_leaves_out_first_tokens(self):
        assert pairs(strided_windows(range(7), 3, 3)) == [([0], [1, 2]), ([3], [4, 5])]

    @pytest.mark.parametrize("num_tokens", [0, 1])
    def test_nothing_to_score(self, num_tokens):
        assert list(strided_windows(range(num_tokens), 4, 2)) == []


class TestSpans:
    def test_the_continuation_is_what_the_whole_has_more_than_the_context(self, tokenizer: Tokenizer):
        maker = SpanMaker(tokenizer, 512)
        (span,) = maker.spans(Loglikelihood(context="the cat", continuation=" sat on"))
        whole = tokenizer.encode("the cat sat on")
        context = tokenizer.encode("the cat")
        assert span == Span(tuple(context), tuple(whole[len(context) :]))

    def test_spaces_at_the_end_of_the_context_belong_to_the_continuation(self, tokenizer: Tokenizer):
        maker = SpanMaker(tokenizer, 512)
        (span,) = maker.spans(Loglikelihood(context="the cat \n ", continuation="sat"))
        assert span.context == tuple(tokenizer.encode("the cat"))
        assert span.context + span.targets == tuple(tokenizer.encode("the cat \n sat"))

    def test_an_empty_context_is_the_first_token(self, tokenizer: Tokenizer):
        (span,) = SpanMaker(tokenizer, 512).spans(Loglikelihood(context="", continuation="the cat"))
        assert span == Span((tokenizer.bos_token_id,), tuple(tokenizer.encode("the cat", add_special_tokens=False)))

    def test_the_first_token_is_not_doubled(self, tokenizer: Tokenizer):
        maker = SpanMaker(tokenizer, 512)
        assert maker.encode("<s>the cat") == tokenizer.encode("<s>the cat", add_special_tokens=False)
        assert maker.encode("the cat") == tokenizer.encode("the cat")

    def test_a_text_begins_after_the_first_token(self, tokenizer: Tokenizer):
        spans = SpanMaker(tokenizer, 8).spans(RollingLoglikelihood(text="the cat sat on the mat, and the dog"))
        assert spans[0].context == (tokenizer.bos_token_id,)
        assert sum((span.targets for span in spans), ()) == tuple(
            tokenizer.encode("the cat sat on the mat, and the dog")
        )
        assert SpanMaker(tokenizer, 8).spans(RollingLoglikelihood(text="")) == list(
            disjoint_windows(tokenizer.encode(""), tokenizer.bos_token_id, 8)
        )

    def test_too_long_says_what_to_do(self, tokenizer: Tokenizer):
        maker = SpanMaker(tokenizer, 8)
        with pytest.raises(ConfigError, match=r"longer than the 8 that the model reads .*--num-fewshot"):
            maker.spans(Loglikelihood(context="the cat " * 9, continuation="sat"))

    def test_nothing_to_score_is_an_error(self, tokenizer: Tokenizer):
        with pytest.raises(ConfigError, match="nothing to score"):
            SpanMaker(tokenizer, 8).spans(Loglikelihood(context="the", continuation=""))


def test_choices_of_one_token_are_one_call():
    spans = [(owner, Span((1, 2, 3), (letter,))) for owner, letter in enumerate((7, 9, 7, 8))]
    (call,) = scoring_calls(spans)
    assert (call.prompt, call.first_target) == ((1, 2, 3), 3)
    assert call.params().logprob_token_ids == (7, 8, 9)
    assert call.params().prompt_logprobs is None


def test_longer_choices_are_scored_from_where_they_begin():
    calls = scoring_calls([(0, Span((1, 2), (3, 4, 5))), (1, Span((1, 2), (3, 4, 6))), (2, Span((1, 2, 3), (4, 5)))])
    assert [(call.prompt, call.first_target, call.spans) for call in calls] == [
        ((1, 2, 3, 4), 2, [(0, 5), (1, 6)]),
        ((1, 2, 3, 4), 3, [(2, 5)]),
    ]
    assert calls[0].params().prompt_logprobs_start == 2
