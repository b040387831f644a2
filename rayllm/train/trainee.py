"""A decoder under training: its stage of the layers, split and sharded, with the loss behind the last one.

Built in one visible order: empty model, stage, adapters, weights block by block, tensor split, recomputation, FSDP2.
No rank ever holds more than its part of the model and one whole block. Letters: M micro-batches, S tokens of a row,
T tokens of a micro-batch, D hidden, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from rayllm.models.checkpoint import DTYPES, SCORE
from rayllm.models.context import DenseContext
from rayllm.models.decoder import Decoder
from rayllm.models.layers import Block, Linear
from rayllm.models.spec import DecoderSpec
from rayllm.parallel.pipeline import keep_stage
from rayllm.train.batch import MicroBatch
from rayllm.train.config import NO_ADAPTERS, LoraConfig, ModelConfig, check_layout
from rayllm.train.head import Head
from rayllm.train.initial import InitialWeights
from rayllm.train.lora import add_adapters
from rayllm.train.mesh import TrainMesh
from rayllm.train.objective import Objective
from rayllm.train.tensor import split_module


class Heads(Enum):
    """What lies behind the last norm. A score or a value is a single row, whole on every tensor rank: `lm_head` of a
    reward model, `value_head` beside the vocabulary's of a policy."""

    VOCABULARY = "vocabulary"
    SCORE = "score"
    VOCABULARY_AND_VALUE = "vocabulary and value"


class Trainee(nn.Module):
    """The unit that is sharded, pipelined and called. `decoder` keeps its names."""

    def __init__(
        self,
        decoder: Decoder,
        objective: Objective,
        mesh: TrainMesh,
        dtype: torch.dtype,
        heads: Heads,
        lora: LoraConfig,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.lora = lora
        self.heads = heads
        self.dtype = dtype  # of the computation
        self.objective = objective
        self._tp_group = mesh.group("tensor") if mesh.layout.tensor > 1 else None
        self._batches: Sequence[MicroBatch] = ()
        self._count = 1
        self._device = mesh.device
        self.measures_K = torch.zeros(0)

    def begin(self, batches: Sequence[MicroBatch], count: int) -> None:
        """The micro-batches of one step, and by how much its loss is divided. `measures_K` will be the sums of the
        objective's measures over those that went through this rank."""
        self._batches, self._count = batches, count
        self.measures_K = torch.zeros(len(self.objective.measures), dtype=torch.float64, device=self._device)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """`x`: token ids of any shape on the first stage, else the hidden states [T, D] of the stage before; `index`,
        one integer: of which micro-batch. -> hidden states [T, D], on the last stage the micro-batch's part of the
        step's loss, a scalar."""
        batch = self._batches[int(index)]
        if self.decoder.embed_tokens is not None:
            x = x.flatten()
        hidden_TD: Tensor = self.decoder(x, batch.positions_T, DenseContext(batch.cu_seqlens, batch.prefixes))
        if self.decoder.lm_head is None:
            return hidden_TD
        loss = self.objective.loss(hidden_TD, self._head(), batch)
        self.measures_K += loss.measures_K
        return loss.total / self._count

    def _head(self) -> Head:
        assert self.decoder.lm_head is not None
        weight_VD = _here(self.decoder.lm_head)
        if self.heads is not Heads.VOCABULARY_AND_VALUE:
            return Head(weight_VD, self._tp_group)
        return Head(weight_VD, self._tp_group, _here(self.decoder.value_head))


def _here(head: nn.Module | Tensor) -> Tensor:
    assert isinstance(head, nn.Module)
    assert isinstance(head.weight, Tensor)
    return head.weight.to_local() if isinstance(head.weight, DTensor) else head.weight


def build_trainee(
    spec: DecoderSpec,
    weights: InitialWeights,
    objective: Objective,
    mesh: TrainMesh,
    config: ModelConfig,
    heads: Heads = Heads.VOCABULARY,
    lora: LoraConfig = NO_ADAPTERS,
) -> Trainee:
    """`weights` have `SCORE` or `VALUE` of `rayllm.train.initial` where `heads` asks for it, and adapters where `lora`
    does.

    Raises ConfigError, before a weight is asked for, where the model cannot be split so.
    """
    check_layout(spec, mesh.layout)
    if heads is Heads.SCORE:
        spec = replace(spec, tie_word_embeddings=False)
    with torch.device("meta"):
        decoder = Decoder(spec)
        if heads is Heads.SCORE:
            decoder.lm_head = Linear(spec.hidden_size, 1, bias=False)
        keep_stage(decoder, mesh.stage)
        if heads is Heads.VOCABULARY_AND_VALUE and mesh.stage.is_last_stage:
            decoder.value_head = Linear(spec.hidden_size, 1, bias=False)
        if lora.rank:
            add_adapters(decoder, lora)
            _unfreeze_new_head(decoder, heads)
    trainee = Trainee(decoder, objective, mesh, DTYPES[config.compute_dtype], heads, lora)
    for number, block in decoder.layers.items():
        name = f"layers.{number}"
        _materialize(block, name, weights, mesh)
        if config.recompute:
            assert isinstance(block, Block)
            block.forward = partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        _shard(block, mesh, config)
    for name in ("embed_tokens", "embed_positions", "norm", "lm_head", "value_head"):
        module = getattr(decoder, name, None)
        ties = name == "lm_head" and spec.tie_word_embeddings and decoder.embed_tokens is not None
        if module is not None and not ties:
            is_score = name == "lm_head" and heads is Heads.SCORE
            _materialize(module, SCORE.removesuffix(".weight") if is_score else name, weights, mesh)
    decoder.tie_weights()
    _shard(trainee, mesh, config)
    return trainee


def _unfreeze_new_head(decoder: Decoder, heads: Heads) -> None:
    """The start model has none, so an adapter beside it would have nothing to start from."""
    new = {Heads.SCORE: decoder.lm_head, Heads.VOCABULARY_AND_VALUE: getattr(decoder, "value_head", None)}
    if isinstance(head := new.get(heads), nn.Module):
        head.requires_grad_()


def _materialize(module: nn.Module, name: str, weights: InitialWeights, mesh: TrainMesh) -> None:
    learns = {parameter: empty.requires_grad for parameter, empty in module.named_parameters()}
    for child, part in module.named_modules():
        for kind, empty in list(part.named_parameters(recurse=False)):
            parameter = ".".join(filter(None, (name, child, kind)))
            value = weights(parameter, tuple(empty.shape)).to(mesh.device)
            setattr(part, kind, nn.Parameter(value))
    if mesh.layout.tensor > 1:
        split_module(module, name, mesh.tensor)
    for parameter, value in module.named_parameters():
        value.requires_grad_(learns[parameter])


def _shard(module: nn.Module, mesh: TrainMesh, config: ModelConfig) -> None:
    """FSDP2 also where nothing is split, since it holds float32 weights beside those of the computation.

    Gradients are summed, not averaged: the loss is divided by what all ranks have.
    """
    if mesh.layout.data == 1 and config.compute_dtype == "float32":
        return
    if mesh.layout.tensor > 1:  # it says so at every start; nothing here changes a tensor that a block gave
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.compute_dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fully_shard(module, mesh=mesh.data, mp_policy=policy, reshard_after_forward=_reshards(module, mesh))
    assert isinstance(module, FSDPModule)
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)


def _reshards(module: nn.Module, mesh: TrainMesh) -> bool:
    """Whether a block's weights are given back after the forward pass. The root's are needed at once again."""
    return mesh.layout.shard > 1 and not isinstance(module, Trainee)
