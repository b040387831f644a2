"""The programs of the committed runs, where there is an exact answer."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.real_runs.alignment import Answered, answer_kl, answer_log_prob, load, mean
from tests.real_runs.corpus import is_held_out, is_korean, page_text, write_corpus
from tests.real_runs.kneser_ney import Trigrams
from tests.real_runs.questions import split
from tests.real_runs.reward import answer_score, auc
from tests.tiny_models import save_tiny

VOCABULARY = 7


def random_documents(seed: int, count: int = 12) -> list[list[int]]:
    """Skewed, so that n-grams are seen once, twice, three times and more often."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, VOCABULARY + 1) ** 1.5
    return [draw.choice(VOCABULARY, size=20, p=weights / weights.sum()).tolist() for _ in range(count)]


@pytest.mark.parametrize("documents", [random_documents(0), random_documents(1, 80), [[3, 1, 3, 1], [3]], [[0]]])
def test_kneser_ney_sums_to_one(documents):
    trigrams = Trigrams(documents, VOCABULARY)
    for first in range(VOCABULARY + 1):
        for second in range(VOCABULARY + 1):
            probabilities = trigrams.distribution((first, second))
            assert (probabilities > 0).all()
            assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_kneser_ney_of_a_token_is_that_of_the_distribution_after_its_context():
    trigrams = Trigrams(random_documents(0), VOCABULARY)
    document = [2, 0, 5, 6, 6]
    found = trigrams.probabilities([document])
    before = [VOCABULARY, VOCABULARY, *document]
    expected = [trigrams.distribution((before[at], before[at + 1]))[token] for at, token in enumerate(document)]
    np.testing.assert_allclose(found, expected, rtol=1e-15)


def test_kneser_ney_is_chen_and_goodmans():
    """Their formulas, one n-gram at a time."""
    documents, start = random_documents(1, 80), VOCABULARY
    tri: Counter = Counter()
    for document in documents:
        padded = [start, start, *document]
        tri.update(zip(padded, padded[1:], padded[2:], strict=False))
    bi, uni = Counter(gram[1:] for gram in tri), Counter()
    uni.update(gram[1:] for gram in bi)

    def probability(tables, gram):
        if not gram:
            return 1 / VOCABULARY
        counts, lower = tables[0], probability(tables[1:], gram[1:])
        sizes = Counter(counts.values())
        y = sizes[1] / (sizes[1] + 2 * sizes[2]) if all(sizes[n] for n in (1, 2, 3, 4)) else None

        def discount(count):
            if count == 0:
                return 0.0
            n = min(count, 3)
            return 0.5 if y is None else min(max(n - (n + 1) * y * sizes[n + 1] / sizes[n], 0.0), float(n))

        after = {key: count for key, count in counts.items() if key[:-1] == gram[:-1]}
        if not after:
            return lower
        total = sum(after.values())
        own = counts.get(gram, 0) - discount(counts.get(gram, 0))
        return own / total + sum(map(discount, after.values())) / total * lower

    trigrams = Trigrams(documents, VOCABULARY)
    for context in ((start, start), (start, 0), (0, 0), (1, 4), (6, 6)):
        expected = [probability((tri, bi, uni), (*context, token)) for token in range(VOCABULARY)]
        np.testing.assert_allclose(trigrams.distribution(context), expected, rtol=1e-12)


def test_text_of_a_page():
    html = (
        '<title>T</title><div id="Index">menu</div><div id="DisplayArea"><h1>A &amp; B</h1><script>x()</script>'
        "<p>one <b>two</b>\n three</p><p> </p><ul><li>four</li></ul></div><div id='SearchFrame'></div><p>debug</p>"
    )
    assert page_text(html) == "A & B\none two three\nfour"


def test_what_is_held_out_is_held_out_in_every_language(tmp_path: Path):
    pages = [
        (language, f"{n}.html", f"{text} {n}") for n in range(200) for language, text in (("en", "a"), ("ko", "가"))
    ]
    write_corpus(iter([*pages, ("en", "copy.html", "a 3"), ("ko", "english.html", "not translated 가")]), tmp_path)

    def numbers(language, name):
        return {json.loads(line)["text"].split()[1] for line in (tmp_path / language / name).read_text().splitlines()}

    held_out = numbers("en", "held-out/test.jsonl")
    assert 3 <= len(held_out) <= 25
    assert held_out == numbers("ko", "held-out/test.jsonl")
    assert numbers("en", "train.jsonl") == numbers("ko", "train.jsonl") == set(map(str, range(200))) - held_out


def test_korean_pages():
    assert is_korean("표를 삽입합니다. Ctrl+F12")
    assert not is_korean("Inserts a table. 표")


def test_how_many_questions_are_held_out_does_not_change_which_are_learnt_from():
    questions = [f"Who wrote book {n}?" for n in range(300)]
    splits = [split(questions, 100, held_out) for held_out in (10, 150, 1000)]
    assert [len(train) for train, _ in splits] == [100] * 3
    assert [len(held_out) for _, held_out in splits] == [10, 150, 200]
    assert all(train == splits[0][0] for train, _ in splits)
    train, held_out = map(set, splits[-1])
    assert train | held_out == set(questions)
    named = {question for question in questions if is_held_out(question)}
    assert named
    assert named <= held_out


def test_kl_of_an_answer_is_that_of_transformers(tmp_path: Path):
    models = []
    for case in ("llama-gqa", "llama-mha"):
        reference = save_tiny(tmp_path / case, case)
        models.append((load(tmp_path / case), reference))
    (policy, theirs), (reference, their_reference) = models
    answered = Answered(tokens=[3, 17, 4, 99, 0, 8, 8, 51], start=3)
    with torch.no_grad():
        log_p, log_q = (
            model(torch.tensor([answered.tokens])).logits[0, 2:-1].double().log_softmax(-1)
            for model in (theirs, their_reference)
        )
    kl = float((log_p.exp() * (log_p - log_q)).sum())
    assert kl > 0.01
    assert answer_kl(policy, reference, answered) == pytest.approx(kl, rel=1e-4)
    assert answer_kl(policy, policy, answered) == 0
    own = float(log_p[torch.arange(5), answered.tokens[3:]].sum())
    assert answer_log_prob(policy, answered) == pytest.approx(own, rel=1e-5)


def test_score_of_an_answer_is_the_heads_of_its_last_token(tmp_path: Path):
    save_tiny(tmp_path, "llama-gqa")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    answered = Answered(tokens=[3, 17, 4, 99, 0, 8, 8, 51], start=3)
    with torch.no_grad():
        expected = float(model.model(torch.tensor([answered.tokens])).last_hidden_state[0, -1] @ model.score.weight[0])
    assert answer_score(model, answered) == pytest.approx(expected, rel=1e-5)


def test_auc():
    assert auc([3.0, 1.0], [0.0, 1.0]) == pytest.approx(3.5 / 4)


def test_mean_and_standard_error():
    assert mean([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, (5 / 3 / 4) ** 0.5))
