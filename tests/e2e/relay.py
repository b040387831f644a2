"""What lies between replicas in these tests: real connections that can be cut or made to stand still, as when the
process behind them is killed or stopped."""

import asyncio
import contextlib

from rayllm.serve.peer import Address


class Relay:
    """Listens where peers look for a replica, and passes on to where that listens."""

    def __init__(self) -> None:
        self.target: Address = ("", 0)
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Nothing gets through, and nobody is told; connections are still accepted, as the kernel does."""
        self._flows.clear()

    def go_on(self) -> None:
        self._flows.set()

    def cut(self) -> None:
        """All connections end, and new ones are refused, until `start`."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._flows.set()

    async def close(self) -> None:
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection(*self.target)
            self._writers.add(there_writer)
            pumps = [asyncio.create_task(self._pump(reader, there_writer))]
            pumps.append(asyncio.create_task(self._pump(there_reader, writer)))
            self._tasks.update(pumps)
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            there_writer.transport.abort()
            self._writers.discard(there_writer)
        writer.transport.abort()
        self._writers.discard(writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()


class Table:
    """The directory of replicas in one process: a relay before each of them."""

    def __init__(self, relays: dict[str, Relay]) -> None:
        self.relays = relays
        self._listed: set[str] = set()

    def join(self, name: str, address: Address) -> None:
        self.relays[name].target = address
        self._listed.add(name)

    def leave(self, name: str) -> None:
        self._listed.discard(name)

    def replicas(self) -> dict[str, Address]:
        return {name: ("127.0.0.1", self.relays[name].port) for name in sorted(self._listed)}

    def clean(self) -> None:
        pass
