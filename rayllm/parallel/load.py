"""One rank's part of a checkpoint, in one visible order: spec, meta model, pipeline split, slices, collectives."""

import torch
from torch import nn

from rayllm.models.checkpoint import Checkpoint
from rayllm.models.decoder import Decoder
from rayllm.parallel.mesh import Mesh
from rayllm.parallel.pipeline import keep_stage
from rayllm.parallel.plan import (
    Style,
    check_layout,
    local_index,
    local_kv_heads,
    local_vocab_size,
    stage_layers,
    style_of,
)
from rayllm.parallel.tensor import add_collectives

__all__ = ["check_layout", "load_shard", "local_kv_heads", "stage_layers"]


def load_shard(checkpoint: Checkpoint, mesh: Mesh, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Raises ConfigError, before a weight is read, where the model cannot be split over `mesh`.

    Reads nothing but this rank's slices, and holds no more than one of them twice.
    """
    check_layout(checkpoint.spec, mesh.tp_size, mesh.pp_size)
    with torch.device("meta"):
        model = Decoder(checkpoint.spec)
    keep_stage(model, mesh)
    _read_slices(model, checkpoint, mesh, dtype, device)
    model.tie_weights()
    add_collectives(model, mesh)
    return model.eval()


def _read_slices(model: Decoder, checkpoint: Checkpoint, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> None:
    """Puts this rank's slice in the place of every meta parameter."""
    for name, _ in list(model.named_parameters()):
        module_name, _, kind = name.rpartition(".")
        style, shape = style_of(module_name), checkpoint.shape(name)
        index = local_index(style, shape, checkpoint.spec, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
        local = [part.stop - part.start for part in index]
        if style is Style.VOCAB:
            local[0] = local_vocab_size(checkpoint.spec, mesh.tp_size)
        # Zeros where the vocabulary is padded; always a copy, never a view of the file, which may be replaced while
        # we serve.
        weight = torch.zeros(local, dtype=dtype, device=device)
        weight[tuple(slice(0, part.stop - part.start) for part in index)] = checkpoint.read(name, index).to(dtype)
        module = model.get_submodule(module_name)
        setattr(module, kind, nn.Parameter(weight))
        _set_sizes(module)


def _set_sizes(module: nn.Module) -> None:
    """The sizes that torch's modules keep beside their weight, for those who read or print them."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = module.weight.shape[0]
