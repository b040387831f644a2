"""All other replicas of the endpoint: found in the directory, watched, forgotten when they are gone."""

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

    def known(self) -> list[Peer]:
        """Those that say how they are."""
        return [peer for peer, _ in self._peers.values() if peer.view is not None]

    def all(self) -> list[Peer]:
        return [peer for peer, _ in self._peers.values()]

    async def listed(self) -> list[Peer]:
        """With those that have just joined. Raises whatever Ray does."""
        self._update(await asyncio.to_thread(self._directory.replicas))
        return self.all()

    async def follow(self) -> None:
        """Until it is cancelled."""
        looks = 0
        try:
            while True:
                try:
                    await self.listed()
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
