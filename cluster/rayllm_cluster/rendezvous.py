"""How the ranks of a group find each other for `torch.distributed`.

Rank 0 binds a port that the system chooses and only then says which, so that no port is free at one moment and taken at
the next. How the address travels to the other ranks is the caller's.
"""

import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from rayllm_cluster.interface import listen_towards

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

Backend = Literal["gloo", "nccl"]


def bind_store(host: str, *, world_size: int, timeout_s: float) -> "TCPStore":
    """Rank 0's store; its `.port` is what the others need. `host` must be an address of this node.

    It listens on that address alone: whoever can write to the store can make the ranks connect elsewhere.
    """
    with socket.create_server((host, 0)) as listening:
        port = listening.getsockname()[1]
        return _store(host, port, world_size, timeout_s, listen_fd=listening.detach())


def connect_store(host: str, port: int, *, world_size: int, timeout_s: float) -> "TCPStore":
    return _store(host, port, world_size, timeout_s, listen_fd=None)


def init_process_group(store: "TCPStore", *, rank: int, world_size: int, backend: Backend, timeout_s: float) -> None:
    """`timeout_s` bounds this call and every collective after it. With nccl the process's GPU is its device 0."""
    import torch
    import torch.distributed as dist

    listen_towards(store.host)
    if backend == "nccl":
        torch.cuda.set_device(0)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=torch.device("cuda", 0) if backend == "nccl" else None,
    )


def _store(host: str, port: int, world_size: int, timeout_s: float, *, listen_fd: int | None) -> "TCPStore":
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(
        host,
        port,
        world_size,
        is_master=listen_fd is not None,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
