"""What training on tokens takes by the model's shape, in floating point operations: of matrix products, a
multiplication and an addition each, forward and backward.

    6 N + 12 L H E S    for a token of a sequence of S       (Chowdhery et al. 2022, PaLM, appendix B)

N: weights that are multiplied by (no embedding, no norm, no bias), L layers, H query heads of size E. As there, a query
counts all S keys although causality hides half, and what is computed twice (recomputation, the logits of a loss) counts
once; so shares of a peak compare with those of others. A token of a packed row counts the keys of its own document, and
no more of them than its layer's window has.
"""

from collections.abc import Iterable

from rayllm.models.spec import DecoderSpec


def multiplied_weights(spec: DecoderSpec, *, vocabulary: bool = True) -> int:
    """N. Without a `vocabulary` the head is a reward model's, which sees one token of an answer and is not counted."""
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = spec.hidden_size * (query + 2 * kv) + query * spec.hidden_size
    mlp = (3 if spec.gated_mlp else 2) * spec.hidden_size * spec.ffn_size
    return spec.num_layers * (attention + mlp) + (spec.vocab_size * spec.hidden_size if vocabulary else 0)


def attended_pairs(spec: DecoderSpec, lengths: Iterable[int]) -> int:
    """Queries times their keys in documents of such lengths, over all layers."""
    lengths = list(lengths)
    return sum(length * min(length, window or length) for window in spec.windows for length in lengths)


def training_flops(spec: DecoderSpec, tokens: int, pairs: int, *, vocabulary: bool = True) -> int:
    """Of `tokens` in documents that attend to so many `pairs`."""
    return 6 * multiplied_weights(spec, vocabulary=vocabulary) * tokens + 12 * spec.num_heads * spec.head_dim * pairs
