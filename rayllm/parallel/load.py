"""One rank's part of a checkpoint, in one visible order: spec, meta model, pipeline split, int8 layers, slices,
collectives."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from rayllm.core.errors import CheckpointError
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.decoder import Decoder
from rayllm.models.quantization import Scheme
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
from rayllm.quant.int8_linear import Int8Linear, linear_names, to_int8
from rayllm.quant.ranges import absmax_scale, round_to_int8

__all__ = ["check_layout", "load_shard", "local_kv_heads", "stage_layers"]


def load_shard(
    checkpoint: Checkpoint,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Scheme | None = None,
) -> Decoder:
    """Raises ConfigError, before a weight is read, where the model cannot be split over `mesh`.

    Keeps nothing but this rank's slices, holds no more than one of them twice, and talks to no other rank. Linear
    layers that are stored as int8 stay so; `quantize` makes those of a checkpoint without any int8 as they are read.
    Raises CheckpointError for a number that is not finite or that its dtype cannot hold, for a negative scale, and
    for outlier columns that are not the layer's.
    """
    check_layout(checkpoint.spec, mesh.tp_size, mesh.pp_size)
    with torch.device("meta"):
        model = Decoder(checkpoint.spec)
    keep_stage(model, mesh)
    if quantize is None:
        schemes = {name: form.scheme for name, form in checkpoint.int8.items()}
    else:
        assert not checkpoint.int8
        schemes = dict.fromkeys(linear_names(model), quantize)
    to_int8(model, schemes, outliers=checkpoint.has_outliers)
    shares = getattr(model.lm_head, "weight", None) is getattr(model.embed_tokens, "weight", model)
    for name, module in list(model.named_modules()):
        if module is not model.lm_head or not shares:
            _load_module(name, module, checkpoint, mesh, dtype, device)
    if shares:
        model.tie_weights()
    add_collectives(model, mesh)
    return model.eval()


def _load_module(
    name: str, module: nn.Module, checkpoint: Checkpoint, mesh: Mesh, dtype: torch.dtype, device: torch.device
) -> None:
    """Puts this rank's slice in the place of each meta parameter of one module, not of those inside it."""
    for kind in [kind for kind, parameter in module.named_parameters(recurse=False) if parameter is not None]:
        if not isinstance(module, Int8Linear) or kind == "bias":
            part = _read_slice(f"{name}.{kind}", checkpoint, mesh, dtype, device)
            setattr(module, kind, nn.Parameter(part))
    if isinstance(module, Int8Linear):
        if name in checkpoint.int8:
            _load_int8(name, module, checkpoint, mesh, device)
        else:
            _quantize(name, module, checkpoint, mesh, device)
    if isinstance(module, nn.Linear):  # sizes that torch's modules keep beside their weight
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = module.weight.shape[0]


def _read_slice(parameter: str, checkpoint: Checkpoint, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> Tensor:
    """This rank's part of one parameter; zeros where the vocabulary is padded.

    Always a copy, never a view of the file, which may be replaced while we serve.
    """
    module_name, _, kind = parameter.rpartition(".")
    style, shape = style_of(module_name), checkpoint.shape(parameter)
    if style is Style.ROW and kind != "weight":
        style = None  # scales belong to outputs, columns are picked by the caller, biases are whole
    index = local_index(style, shape, checkpoint.spec, tp_rank=mesh.tp_rank, tp_size=mesh.tp_size)
    local = [part.stop - part.start for part in index]
    if style is Style.VOCAB:
        local[0] = local_vocab_size(checkpoint.spec, mesh.tp_size)
    part = torch.zeros(local, dtype=dtype, device=device)
    stored = checkpoint.read(parameter, index)
    part[tuple(slice(0, part.stop - part.start) for part in index)] = stored.to(dtype)
    if not _is_finite(part):
        what = f"numbers too large for {str(dtype).removeprefix('torch.')}" if _is_finite(stored) else "NaN or infinity"
        raise CheckpointError(checkpoint.directory, f"tensor {checkpoint.source(parameter).name} holds {what}")
    return part


def _is_finite(tensor: Tensor) -> bool:
    """By its extremes, which are found at the speed of reading."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _load_int8(name: str, module: Int8Linear, checkpoint: Checkpoint, mesh: Mesh, device: torch.device) -> None:
    weight_NK = _read_slice(f"{name}.weight", checkpoint, mesh, torch.int8, device)
    scale_N1 = _read_slice(f"{name}.weight_scale", checkpoint, mesh, torch.float32, device)
    if (scale_N1 < 0).any():
        stored = checkpoint.source(f"{name}.weight_scale").name
        raise CheckpointError(checkpoint.directory, f"tensor {stored} holds a negative scale")
    module.set_weight(weight_NK, scale_N1)
    if module.outlier_columns is None:
        return
    shape = checkpoint.shape(f"{name}.outlier_columns")
    columns_J = checkpoint.read(f"{name}.outlier_columns", (slice(0, *shape),)).to(device)
    inputs = checkpoint.shape(f"{name}.weight")[1]
    if not ((columns_J >= 0) & (columns_J < inputs)).all() or not (columns_J.diff() > 0).all():
        stored = checkpoint.source(f"{name}.outlier_columns").name
        raise CheckpointError(checkpoint.directory, f"tensor {stored} is no rising list of columns below {inputs}")
    weight_NJ = _read_slice(f"{name}.outlier_weight", checkpoint, mesh, torch.bfloat16, device)
    before = 0  # columns of the ranks before this one
    if style_of(name) is Style.ROW:
        first = mesh.tp_rank * weight_NK.shape[1]
        before = int((columns_J < first).sum())
        columns_J = columns_J[(columns_J >= first) & (columns_J < first + weight_NK.shape[1])] - first
    module.set_outliers(columns_J.clone(), weight_NJ, before)


def _quantize(name: str, module: Int8Linear, checkpoint: Checkpoint, mesh: Mesh, device: torch.device) -> None:
    """The scale of an output that is split over ranks is that of its whole row, as it would be on one rank. For it
    the other slices are read too: ranks that load do not talk, so that none waits for one that fails, or that also
    computes steps meanwhile."""
    weight_NK = _read_slice(f"{name}.weight", checkpoint, mesh, torch.float32, device)
    scale_N1 = absmax_scale(weight_NK)
    if style_of(name) is Style.ROW:
        for rank in set(range(mesh.tp_size)) - {mesh.tp_rank}:
            other = replace(mesh, tp_rank=rank)
            other_NK = _read_slice(f"{name}.weight", checkpoint, other, torch.float32, device)
            scale_N1 = torch.maximum(scale_N1, absmax_scale(other_NK))
    module.set_weight(round_to_int8(weight_NK, scale_N1), scale_N1)
