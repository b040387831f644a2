"""This replica in the directory, and all others there: found, watched, forgotten when they are gone."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

from rayllm.serve.peer import Address, Peer

logger = logging.getLogger(__name__)

_LOOK_S: Final = 2.0
_CLEAN_EVERY: Final = 5  # looks, while a replica that is listed does not answer


class Directory(Protocol):
    """Blocks; may raise anything when it cannot be reached."""

    def join(self, name: str, address: Address) -> None: ...
    def leave(self, name: str) -> None: ...
    def replicas(self) -> dict[str, Address]: ...

    def clean(self) -> None:
        """Forget replicas that died without leaving."""


class Peers:
    def __init__(self, directory: Directory, *, own_name: str, key: bytes, lost: Callable[[str], None]) -> None:
        """`lost`: told of the name of each peer that is."""
        self._directory = directory
        self._own_name = own_name
        self._key = key
        self._lost = lost
        self._peers: dict[str, tuple[Peer, asyncio.Task[None]]] = {}
        self._own_address: Address | None = None  # None: this replica is not to be found
        self._writing = asyncio.Lock()  # what is written in a thread would else be overtaken

    async def join(self, address: Address) -> None:
        """Until `leave`: another replica takes out one that Ray names no more, and Ray may be wrong for a while."""
        self._own_address = address
        await self._write()

    async def leave(self) -> None:
        self._own_address = None
        await self._write()

    def known(self) -> list[Peer]:
        """Those that say how they are."""
        return [peer for peer, _ in self._peers.values() if peer.view is not None]

    def all(self) -> list[Peer]:
        return [peer for peer, _ in self._peers.values()]

    async def listed(self) -> list[Peer]:
        """With those that have just joined. Raises whatever Ray does."""
        await self._look()
        return self.all()

    async def follow(self) -> None:
        """Until it is cancelled."""
        looks = 0
        try:
            while True:
                try:
                    if (await self._look()).get(self._own_name) != self._own_address:
                        await self._write()
                    looks += 1
                    if looks % _CLEAN_EVERY == 0 and len(self.known()) < len(self._peers):
                        await asyncio.to_thread(self._directory.clean)
                except Exception as error:  # noqa: BLE001 - Ray has many; the peers that are known stay
                    logger.warning("the directory of the replicas cannot be read: %r", error)
                await asyncio.sleep(_LOOK_S)
        finally:
            for _, task in self._peers.values():
                task.cancel()
            await asyncio.gather(*(task for _, task in self._peers.values()), return_exceptions=True)

    async def _write(self) -> None:
        async with self._writing:
            if self._own_address is None:
                await asyncio.to_thread(self._directory.leave, self._own_name)
            else:
                await asyncio.to_thread(self._directory.join, self._own_name, self._own_address)

    async def _look(self) -> dict[str, Address]:
        listed = await asyncio.to_thread(self._directory.replicas)
        self._update(listed)
        return listed

    def _update(self, listed: dict[str, Address]) -> None:
        for name, (peer, task) in list(self._peers.items()):
            # One that has left may still answer what it was sent: its own connection says when it is gone.
            if listed.get(name) != peer.address and peer.view is None:
                task.cancel()
                del self._peers[name]
        for name, address in listed.items():
            if name != self._own_name and name not in self._peers:
                peer = Peer(name, address, own_name=self._own_name, key=self._key, lost=self._lost)
                self._peers[name] = peer, asyncio.create_task(peer.watch())
