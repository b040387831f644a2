"""What training on tokens takes by the model's shape, in floating point operations: of matrix products, a
multiplication and an addition each, forward and backward.

    6 N + 12 L H E S    for a token of a sequence of S       (Chowdhery et al. 2022, PaLM, appendix B)

N: weights that are multiplied by (no embedding, no norm, no bias), L layers, H query heads of size E. As there, a query
counts all S keys although causality hides half, and what is computed twice (recomputation, the logits of a loss) counts
once; of tokens that predict nothing there are no logits; so shares of a peak compare with those of others. Weights that
adapters stand beside have no gradient of their own: 4 N, and 6 for each weight of an adapter. A token of a packed row
counts the keys of its own document, borrowed ones too, and no more of them than its layer's window has.
"""

from collections.abc import Iterable

from rayllm.models.spec import DecoderSpec
from rayllm.train.config import LoraConfig


def multiplied_weights(spec: DecoderSpec, *, vocabulary: bool = True) -> int:
    """N. Without a `vocabulary` the head is a reward model's, which sees one token of an answer and is not counted."""
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = spec.hidden_size * (query + 2 * kv) + query * spec.hidden_size
    mlp = (3 if spec.gated_mlp else 2) * spec.hidden_size * spec.ffn_size
    return spec.num_layers * (attention + mlp) + (spec.vocab_size * spec.hidden_size if vocabulary else 0)


def attended_pairs(spec: DecoderSpec, documents: Iterable[tuple[int, int]]) -> int:
    """Queries times keys, over all layers, of documents of so many queries and keys."""
    documents = list(documents)
    return sum(queries * min(keys, window or keys) for window in spec.windows for queries, keys in documents)


def adapter_weights(spec: DecoderSpec, lora: LoraConfig) -> int:
    """Of all adapters; 0 where there are none."""
    hidden, query, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    sides = {"q_proj": hidden + query, "k_proj": hidden + kv, "v_proj": hidden + kv, "o_proj": query + hidden}
    return spec.num_layers * lora.rank * sum(sides.get(target, hidden + spec.ffn_size) for target in lora.targets)


def training_flops(spec: DecoderSpec, tokens: int, pairs: int, predictions: int, *, adapters: int = 0) -> int:
    """Of `tokens` in documents that attend to so many `pairs`; `predictions`: of how many of them logits are taken.
    `adapters`: how many weights they have, if they alone learn."""
    blocks = multiplied_weights(spec, vocabulary=False)
    products = blocks * tokens + (multiplied_weights(spec) - blocks) * predictions
    return (4 if adapters else 6) * products + 6 * adapters * tokens + 12 * spec.num_heads * spec.head_dim * pairs
