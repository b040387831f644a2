"""Pipeline parallel: a stage is a decoder without the parts of the others; hidden states travel between neighbours."""

import torch
import torch.distributed as dist
from torch import Tensor

from rayllm.models.decoder import Decoder
from rayllm.parallel.mesh import Mesh
from rayllm.parallel.plan import stage_layers


def keep_stage(model: Decoder, mesh: Mesh) -> None:
    """Drops what another stage computes. A tied head on the last stage keeps its own copy of the embedding."""
    mine = stage_layers(model.spec.num_layers, mesh.pp_rank, mesh.pp_size)
    for name in list(model.layers):
        if int(name) not in mine:
            del model.layers[name]
    if not mesh.is_first_stage:
        model.embed_tokens = model.embed_positions = None
    if not mesh.is_last_stage:
        model.norm = model.lm_head = None


def recv_hidden(mesh: Mesh, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Waits for the hidden states [T, D] of the stage before."""
    hidden_TD = torch.empty(num_tokens, hidden_size, dtype=dtype, device=device)
    dist.recv(hidden_TD, src=mesh.prev_rank, group=mesh.pp_group)
    return hidden_TD


def send_hidden(mesh: Mesh, hidden_TD: Tensor) -> None:
    """Returns when the tensor may be reused; on gloo not before the next stage asks for it."""
    dist.send(hidden_TD.contiguous(), dst=mesh.next_rank, group=mesh.pp_group)
