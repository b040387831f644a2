"""The one decoder of every family, described by a `DecoderSpec`.

Single device: no rank, no process group, no quantization inside; `rayllm.parallel` takes parts away and replaces
others. Built under `torch.device("meta")` it allocates nothing. Letters: T tokens of all sequences, flat; D hidden;
V vocabulary.
"""

import torch
from torch import Tensor, nn

from rayllm.models.context import ForwardContext
from rayllm.models.layers import Block, Linear, add_norm, make_norm
from rayllm.models.rope import RotaryEmbedding, Rotation
from rayllm.models.spec import DecoderSpec


class Decoder(nn.Module):
    """`embed_tokens`, `embed_positions`, `norm` and `lm_head` are None in a pipeline stage that has no use for them.

    `layers` is keyed by the layer's number in the whole model, so that a stage keeps its names. The weights are for
    the caller to set: embeddings are not even initialised.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.rotary = None if spec.rope is None else RotaryEmbedding(spec.rope, spec.head_dim)
        self.embed_tokens: nn.Module | None = _embedding(spec.vocab_size, spec.hidden_size)
        self.embed_positions: nn.Module | None = None
        if spec.rope is None:
            self.embed_positions = _embedding(spec.max_position_embeddings, spec.hidden_size)
        self.layers = nn.ModuleDict({str(layer): Block(spec, layer) for layer in range(spec.num_layers)})
        self.norm: nn.Module | None = make_norm(spec)
        self.lm_head: nn.Module | None = Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.tie_weights()

    def forward(self, x: Tensor, positions_T: Tensor, context: ForwardContext) -> Tensor:
        """`x`: token ids [T] where there is an embedding, else the hidden states [T, D] of the stage before.

        -> hidden states [T, D], normalised where there is a last norm: what `logits` takes.
        """
        x_TD, rotation = self.embed(x, positions_T, context.rope_lengths_T)
        return self.transform(x_TD, rotation, context)

    def embed(self, x: Tensor, positions_T: Tensor, rope_lengths_T: Tensor | None) -> tuple[Tensor, Rotation | None]:
        """The part before the first block: -> hidden states [T, D], and the angles for all blocks."""
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions_T)
        if self.rotary is None:
            return x, None
        return x, self.rotary.rotation(positions_T, rope_lengths_T, x.dtype)

    def transform(self, x_TD: Tensor, rotation: Rotation | None, context: ForwardContext) -> Tensor:
        """All blocks and the last norm."""
        residual_TD = None
        for block in self.layers.values():
            x_TD, residual_TD = block(x_TD, residual_TD, rotation, context)
        if self.norm is not None:
            return add_norm(self.norm, x_TD, residual_TD)[0]
        return x_TD if residual_TD is None else residual_TD + x_TD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """-> [T, V], in the dtype of the weights. Only on the last pipeline stage."""
        assert self.lm_head is not None, "this pipeline stage has no head"
        logits_TV: Tensor = self.lm_head(hidden_TD)
        return logits_TV

    def tie_weights(self) -> None:
        """Makes the head and the embedding one parameter, where the spec says so and both are here.

        To be called again by whoever replaced one of the two.
        """
        if self.spec.tie_word_embeddings and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight


def _embedding(count: int, size: int) -> nn.Embedding:
    # The constructor's normal_() on the meta device makes torch import 900 modules: 1.3 s at every start.
    return nn.Embedding(count, size, _weight=torch.empty(count, size))
