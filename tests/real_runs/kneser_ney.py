"""What a trigram model and general compressors make of the same held-out bytes.

    python -m tests.real_runs.kneser_ney runs-data --language en

Interpolated Kneser-Ney with three discounts an order (Chen and Goodman 1998, section 3) over the tokens of the model's
own tokenizer, a document's first two contexts being its beginning: as `rayllm eval --tasks perplexity` reads it, every
token of the text is predicted and nothing else. Learnt from the training text of both languages, as the model is.
Letters: N n-grams, T tokens.
"""

import argparse
import gzip
import json
import lzma
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayllm.core.tokenizer import Tokenizer
from tests.real_runs.corpus import LANGUAGES, read_texts

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Order:
    """The discounted distribution of the last token of an n-gram after the tokens before it; an n-gram is the number
    whose digits, `base` the vocabulary and the beginning, are its tokens."""

    def __init__(self, grams_N: Ints, counts_N: Ints, base: int) -> None:
        """`grams_N`: ascending, each once."""
        self._grams, self._counts, self._base = grams_N, counts_N, base
        self._discounts = _discounts(counts_N)
        discounts_N = self._discounts[np.minimum(counts_N, 3)]
        self._contexts, which_N = np.unique(grams_N // base, return_inverse=True)
        self._totals = np.bincount(which_N, weights=counts_N)
        self._left = np.bincount(which_N, weights=discounts_N) / self._totals

    def __call__(self, grams_T: Ints, lower_T: Floats) -> Floats:
        """`lower_T`: the probability of the last token by the order below."""
        place_T, known_T = _find(self._contexts, grams_T // self._base)
        gram_T, seen_T = _find(self._grams, grams_T)
        counts_T = np.where(seen_T, self._counts[gram_T], 0)
        own_T = (counts_T - self._discounts[np.minimum(counts_T, 3)]) / self._totals[place_T]
        return np.where(known_T, own_T + self._left[place_T] * lower_T, lower_T)


class Trigrams:
    """Learnt from documents of token ids below `vocabulary`."""

    def __init__(self, documents: Sequence[Sequence[int]], vocabulary: int) -> None:
        self._vocabulary, self._base = vocabulary, vocabulary + 1
        base = self._base
        grams_N, counts_N = np.unique(self._grams(documents), return_counts=True)
        orders = [_Order(grams_N, counts_N, base)]
        for size in (2, 1):  # lower orders count how many different tokens an n-gram was seen after
            grams_N, counts_N = np.unique(grams_N % base**size, return_counts=True)
            orders.append(_Order(grams_N, counts_N, base))
        self._orders = orders[::-1]

    def probabilities(self, documents: Sequence[Sequence[int]]) -> Floats:
        """Of every token of every document after those before it."""
        return self._of(self._grams(documents))

    def distribution(self, before: tuple[int, int]) -> Floats:
        """Of all tokens after two; `vocabulary` in the place of a token is the beginning of a document."""
        first, second = before
        return self._of((first * self._base + second) * self._base + np.arange(self._vocabulary))

    def _of(self, grams_T: Ints) -> Floats:
        probabilities_T = np.full(len(grams_T), 1 / self._vocabulary)
        for size, order in enumerate(self._orders, start=1):
            probabilities_T = order(grams_T % self._base**size, probabilities_T)
        return probabilities_T

    def _grams(self, documents: Sequence[Sequence[int]]) -> Ints:
        start = self._vocabulary
        parts = []
        for document in documents:
            ids = np.array([start, start, *document], dtype=np.int64)
            parts.append((ids[:-2] * self._base + ids[1:-1]) * self._base + ids[2:])
        return np.concatenate(parts)


def _discounts(counts_N: Ints) -> Floats:
    """By count: 0, 1, 2, and 3 or more. Where too few n-grams have a small count, as in a text of a few words, 1/2."""
    n1, n2, n3, n4 = (int((counts_N == count).sum()) for count in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(discounts, 0.0, [0.0, 1.0, 2.0, 3.0])


def _find(sorted_N: Ints, wanted_T: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    place_T = np.minimum(np.searchsorted(sorted_N, wanted_T), len(sorted_N) - 1)
    return place_T, sorted_N[place_T] == wanted_T


def _compressed(held_out: bytes, before: bytes) -> dict[str, int]:
    """Sizes in bytes. The last: by how much the held-out text lengthens what comes of the training text before it, so
    that xz has read it all, as the models have."""
    both, alone = (len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (before + held_out, before))
    return {
        "gzip": len(gzip.compress(held_out, 9)),
        "xz": len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)),
        "xz_after_training_text": both - alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte of held-out text, by a trigram model and compressors.")
    parser.add_argument("corpus", type=Path, help="what tests.real_runs.corpus made")
    parser.add_argument("--language", choices=sorted(LANGUAGES.values()), required=True)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.corpus / "model")

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(text) for text in texts]

    training = [
        text for language in LANGUAGES.values() for text in read_texts(arguments.corpus / language / "train.jsonl")
    ]
    held_out = read_texts(arguments.corpus / arguments.language / "held-out/test.jsonl")
    trigrams = Trigrams(ids(training), tokenizer.vocab_size)
    bits = -float(np.log(trigrams.probabilities(ids(held_out))).sum()) / math.log(2)
    data = "\n\n".join(held_out).encode()
    size = sum(len(text.encode()) for text in held_out)
    figures = {"documents": len(held_out), "bytes": size, "kneser_ney_3gram": bits / size}
    before = "\n\n".join([*training, ""]).encode()
    figures.update({name: 8 * length / size for name, length in _compressed(data, before).items()})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
