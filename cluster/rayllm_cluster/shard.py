"""The shard's side: a process that builds a handler and feeds it the frames of one epoch. Does not import Ray."""

import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from rayllm_cluster.channel import Channel, FrameKind
from rayllm_cluster.errors import HandshakeError, PeerClosedError, RemoteError
from rayllm_cluster.handshake import Address, connect
from rayllm_cluster.rendezvous import Backend, bind_store, connect_store, init_process_group

logger = logging.getLogger(__name__)


class Handler(Protocol):
    """What runs in a shard. An exception in either method ends the group and reaches the driver as one line."""

    def ready(self) -> bytes:
        """Called once, when the handler is built: what the driver learns of this rank as it starts."""
        ...

    def handle(self, payload: bytes) -> bytes | None:
        """Called for each payload in the order sent; what it returns, if not None, is this rank's answer."""
        ...


HandlerFactory = Callable[[int, int, bytes], Handler]  # (rank, world_size, config)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSpec:
    """All that a shard needs to become a member of its group."""

    rank: int
    world_size: int
    epoch: int
    factory: str | HandlerFactory  # "module:function", or the function
    config: bytes
    driver: Address
    key: bytes
    store_host: str  # rank 0's own address, as all ranks reach it
    backend: Backend
    threads: int
    collective_timeout_s: float
    max_frame_bytes: int


class Shard:
    """The actor. SIGUSR1 makes it write the stacks of its threads to its log."""

    def __init__(self, spec: ShardSpec) -> None:
        self._spec = spec
        # Before torch is imported, which reads it once; Ray's default is the CPUs that the actor asked for.
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(spec.threads)
        faulthandler.register(signal.SIGUSR1, all_threads=True)

    def run(self) -> bytes | None:
        """Called once; returns when the group is closed (None) or the shard has failed (an encoded RemoteError)."""
        spec = self._spec
        try:
            connection = connect(spec.driver, key=spec.key, rank=spec.rank, epoch=spec.epoch)
        except HandshakeError as error:
            return RemoteError.of(error).encode()
        channel = Channel(connection, epoch=spec.epoch, limit=spec.max_frame_bytes)
        try:
            self._serve(channel)
        except PeerClosedError:
            logger.warning("The driver of shard %d is gone", spec.rank)
        except Exception as error:
            logger.exception("Shard %d failed", spec.rank)
            failure = RemoteError.of(error).encode()
            with contextlib.suppress(PeerClosedError):
                channel.send(failure, FrameKind.ERROR)
            return failure
        return None

    def _serve(self, channel: Channel) -> None:
        spec = self._spec
        if spec.world_size > 1:
            self._join(channel)
        handler = load_factory(spec.factory)(spec.rank, spec.world_size, spec.config)
        channel.send(handler.ready(), FrameKind.READY)
        while (frame := channel.recv()).kind is FrameKind.DATA:
            answer = handler.handle(frame.payload)
            if answer is not None:
                channel.send(answer)

    def _join(self, channel: Channel) -> None:
        spec = self._spec
        if spec.rank == 0:
            store = bind_store(spec.store_host, world_size=spec.world_size, timeout_s=spec.collective_timeout_s)
            channel.send(str(store.port).encode(), FrameKind.PORT)
        else:
            port = int(channel.recv().payload)
            store = connect_store(
                spec.store_host, port, world_size=spec.world_size, timeout_s=spec.collective_timeout_s
            )
        init_process_group(
            store,
            rank=spec.rank,
            world_size=spec.world_size,
            backend=spec.backend,
            timeout_s=spec.collective_timeout_s,
        )


def load_factory(factory: str | HandlerFactory) -> HandlerFactory:
    """`"package.module:function"` imported, or the function as it is."""
    if not isinstance(factory, str):
        return factory
    module, _, name = factory.partition(":")
    return cast("HandlerFactory", getattr(importlib.import_module(module), name))
