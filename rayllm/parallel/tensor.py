"""Tensor parallel: a model whose parameters are already this rank's slices gets the collectives that make it whole.

For serving: the collectives have no gradient. One all-reduce after each attention and each MLP, for W8A8 a small one
before their last product, one after the embedding, one gather of the logits; nothing else. Letters: T tokens, D hidden,
V vocabulary, K inputs of a rank's slice.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rayllm.models.decoder import Decoder
from rayllm.parallel.mesh import Mesh
from rayllm.parallel.plan import Style, local_vocab_size, style_of
from rayllm.quant.int8_linear import Int8Linear
from rayllm_kernels import row_bounds


class RowParallel(nn.Module):
    """Sums the ranks' products; takes the bias out of `linear` and adds it once, after the sum."""

    def __init__(self, linear: nn.Linear, group: ProcessGroup) -> None:
        super().__init__()
        self.linear = linear
        self.bias = linear.bias
        linear.register_parameter("bias", None)
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x)
        dist.all_reduce(output, group=self._group)
        return output if self.bias is None else output + self.bias


class W8A8RowParallel(RowParallel):
    """Every rank rounds its slice of a row to the steps of the whole row, so the integers are those of one rank. Their
    sums are added as integers and scaled once, as one rank does: all ranks but one would else round the next layer's
    values otherwise here and there, and the layers after it ever more of them.

    So it would be with the sums of what keeps 16 bits. Every rank therefore gets the inputs of those few columns, along
    with the sums, and multiplies them all, in the order that one rank has.
    """

    linear: Int8Linear

    def forward(self, x_TK: Tensor) -> Tensor:
        bound_T1 = row_bounds(x_TK, self.linear.outlier_columns)
        # The order of magnitudes is that of their bits, with NaN above all, which a maximum of floats may lose
        dist.all_reduce(bound_T1.view(torch.int32), dist.ReduceOp.MAX, group=self._group)
        sums_TS = self.linear.sums(x_TK, bound_T1)
        dist.all_reduce(sums_TS, group=self._group)
        return self.linear.output(sums_TS, bound_T1, self.bias, x_TK.dtype)


class VocabParallelEmbedding(nn.Module):
    """Holds the tokens from `first` on; a rank contributes zeros for all others."""

    def __init__(self, embedding: nn.Embedding, first: int, group: ProcessGroup) -> None:
        super().__init__()
        self.embedding = embedding
        self._first = first
        self._group = group

    def forward(self, ids_T: Tensor) -> Tensor:
        local_T = ids_T - self._first
        absent_T = (local_T < 0) | (local_T >= self.embedding.weight.shape[0])
        x_TD: Tensor = self.embedding(local_T.masked_fill(absent_T, 0))
        x_TD = x_TD.masked_fill(absent_T[:, None], 0)
        dist.all_reduce(x_TD, group=self._group)
        return x_TD


class VocabParallelHead(nn.Module):
    """-> on tp rank 0 the logits [T, V] of the whole vocabulary, without padding; elsewhere only the rank's own part,
    padding included, which is of no use but to keep one signature."""

    def __init__(self, linear: nn.Linear, vocab_size: int, rank: int, group: ProcessGroup) -> None:
        super().__init__()
        self.linear = linear
        self._vocab_size = vocab_size
        self._rank = rank
        self._group = group

    def forward(self, hidden_TD: Tensor) -> Tensor:
        part: Tensor = self.linear(hidden_TD)
        if self._rank != 0:
            dist.gather(part, group=self._group, group_dst=0)
            return part
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self._group))]
        dist.gather(part, parts, group=self._group, group_dst=0)
        return torch.cat(parts, dim=-1)[:, : self._vocab_size]


def add_collectives(model: Decoder, mesh: Mesh) -> None:
    """Wraps the modules of `model` that the plan splits by row or by vocabulary. Nothing to do for one tensor rank."""
    if mesh.tp_group is None:
        return
    for name, module in list(model.named_modules()):
        match style_of(name):
            case Style.ROW:
                assert isinstance(module, nn.Linear)
                is_w8a8 = isinstance(module, Int8Linear) and module.scheme == "w8a8"
                wrap = W8A8RowParallel if is_w8a8 else RowParallel
                model.set_submodule(name, wrap(module, mesh.tp_group))
            case Style.VOCAB if isinstance(module, nn.Embedding):
                first = mesh.tp_rank * local_vocab_size(model.spec, mesh.tp_size)
                model.embed_tokens = VocabParallelEmbedding(module, first, mesh.tp_group)
            case Style.VOCAB:
                assert isinstance(module, nn.Linear)
                model.lm_head = VocabParallelHead(module, model.spec.vocab_size, mesh.tp_rank, mesh.tp_group)
