"""Perplexity of texts, by word, byte and bit, or by token with overlapping windows.

A figure by words and one by tokens differ widely for the same model and text, and so do windows with and without
overlap; hence the names.
"""

import math
import re
from collections.abc import Sequence

from rayllm.core.errors import ConfigError
from rayllm.eval.data import Data, Table
from rayllm.eval.task import (
    Document,
    Likelihood,
    Metric,
    Request,
    Response,
    RollingLoglikelihood,
    Score,
    Scored,
    Task,
)


class Perplexity(Task):
    """Of a user's own texts, each as it is: lm-eval's `loglikelihood_rolling`.

    Disjoint windows as long as the model's context. Words and bytes are those of the text as it lies in the data.
    """

    name = "perplexity"
    version = "1.0"
    metrics: tuple[str, ...] = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    column = "text"

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(Table(name="perplexity", split="test", columns=(self.column,), on_hub=False))

    def original(self, document: Document) -> str:
        text = document.fields[self.column]
        if not isinstance(text, str):
            raise TypeError(f"{self.column} is {type(text).__name__}, no text")
        return text

    def question(self, document: Document) -> str:
        return ""

    def target(self, document: Document) -> str:
        return self.original(document)

    def requests(self, document: Document, prompt: str) -> Sequence[Request]:
        if prompt:
            raise ConfigError(f"{self.name}: a text has no shots; leave --num-fewshot out")
        return [RollingLoglikelihood(text=self.target(document))]

    def score(self, document: Document, responses: Sequence[Response]) -> Score:
        """The likelihood, and what it is divided by, not yet a metric: a metric is a ratio of sums."""
        (response,) = responses
        assert isinstance(response, Likelihood)
        text = self.original(document)
        return Score(
            values={
                "loglikelihood": response.logprob,
                "tokens": float(response.num_tokens),
                "words": float(len(re.split(r"\s+", text))),
                "bytes": float(len(text.encode())),
            }
        )

    def worth(self, document: Document, text: str) -> float:
        raise ConfigError(f"{self.name} gives no reward: it has no answers")

    def aggregate(self, scored: Sequence[Scored]) -> list[Metric]:
        by_word = _nats_per(scored, "words")
        by_byte = _nats_per(scored, "bytes")
        values = (_exp(by_word), _exp(by_byte), by_byte / math.log(2))
        return [
            Metric(name=name, value=value, stderr=None, num_documents=len(scored))
            for name, value in zip(self.metrics, values, strict=True)
        ]


class WikiText(Perplexity):
    """WikiText-2 by page, with its artefacts removed before the model reads it; words and bytes are the original's."""

    name = "wikitext"
    version = "2.0"
    column = "page"

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(
            Table(
                name="EleutherAI/wikitext_document_level",
                config="wikitext-2-raw-v1",
                split="test",
                columns=(self.column,),
            )
        )

    def target(self, document: Document) -> str:
        return detokenized(self.original(document))


class StridedPerplexity(Perplexity):
    """By token, in windows of 1024 that overlap by half: the recipe in Hugging Face's documentation. Each token is read
    with at least 512 before it, but for those of a text's first window."""

    name = "perplexity_strided"
    version = "1.0"
    metrics = ("token_perplexity",)
    window, stride = 1024, 512

    def requests(self, document: Document, prompt: str) -> Sequence[Request]:
        (rolling,) = super().requests(document, prompt)
        assert isinstance(rolling, RollingLoglikelihood)
        return [RollingLoglikelihood(text=rolling.text, window=self.window, stride=self.stride)]

    def aggregate(self, scored: Sequence[Scored]) -> list[Metric]:
        value = _exp(_nats_per(scored, "tokens"))
        return [Metric(name=self.metrics[0], value=value, stderr=None, num_documents=len(scored))]


def _nats_per(scored: Sequence[Scored], unit: str) -> float:
    units = math.fsum(score.values[unit] for _, score in scored)
    return -math.fsum(score.values["loglikelihood"] for _, score in scored) / max(units, 1.0)


def _exp(nats: float) -> float:
    """Infinity beyond what a float holds: a text without spaces is one word, of many nats."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


_REPLACED = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_TIGHTENED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REPLACED_LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenized(page: str) -> str:
    """As it was before WikiText's tokenizer; lm-eval's rules in lm-eval's order."""
    for old, new in _REPLACED:
        page = page.replace(old, new)
    for pattern, replacement in _TIGHTENED:
        page = re.sub(pattern, replacement, page)
    for old, new in _REPLACED_LAST:
        page = page.replace(old, new)
    return page
