"""Connections between members: who gets in, what is cut, who waits."""

import asyncio
import contextlib
import importlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from rayllm_cluster.errors import FrameError, HandshakeError, PeerClosedError
from rayllm_cluster.streams import FrameStream, connect, serve

KEY = secrets.token_bytes(32)
LIMIT = 1 << 20


@asynccontextmanager
async def server(handle: Callable[[FrameStream], Awaitable[None]], key: bytes = KEY) -> AsyncIterator[int]:
    listening = await serve("127.0.0.1", handle, key=key, name="server", limit=LIMIT)
    yield listening.sockets[0].getsockname()[1]
    listening.close()


async def echo(stream: FrameStream) -> None:
    with contextlib.suppress(PeerClosedError, FrameError):
        while True:
            await stream.send(stream.name.encode() + await stream.recv())


async def to(port: int, key: bytes = KEY, limit: int = LIMIT) -> FrameStream:
    return await connect("127.0.0.1", port, key=key, name="client", limit=limit)


async def test_members_know_each_other_by_name():
    async with server(echo) as port:
        stream = await to(port)
        assert stream.name == "server"
        for payload in (b"", b"x", secrets.token_bytes(300_000)):
            await stream.send(payload)
            assert await stream.recv() == b"client" + payload
        stream.close()
        assert not stream.is_open
        with pytest.raises(PeerClosedError):
            await stream.recv()


async def test_another_key_opens_nothing(caplog):
    handled = []

    async def handle(stream: FrameStream) -> None:
        handled.append(stream)

    async with server(handle) as port:
        with pytest.raises(HandshakeError):
            await to(port, key=secrets.token_bytes(32))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" + bytes(200))
        assert len(await reader.read(1000)) == 32, "the challenge"
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
    assert not handled
    assert "does not know the group's key" in caplog.text


async def test_a_server_that_does_not_know_the_key_learns_nothing_and_is_found_out():
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(32))
        hello = await reader.readexactly(128)
        writer.write(hello)  # the client's own proof, played back
        await writer.drain()

    listening = await asyncio.start_server(impostor, "127.0.0.1", 0)
    with pytest.raises(HandshakeError, match="does not know the group's key"):
        await to(listening.sockets[0].getsockname()[1])
    listening.close()


async def test_a_crowd_gets_in_at_once():
    """Who finds no room in the backlog is not welcomed within the time for a handshake."""
    async with server(echo) as port:
        streams = await asyncio.gather(*(to(port) for _ in range(400)))
        for stream in streams:
            stream.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_sending_on_a_connection_that_is_closed(loop: str):
    async def check() -> None:
        async with server(echo) as port:
            stream = await to(port)
            stream.close()
            for _ in range(3):
                with pytest.raises(PeerClosedError):
                    await stream.send(b"x")
                await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=importlib.import_module(loop).new_event_loop) as runner:
        runner.run(check())


async def test_nobody_there():
    listening = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    listening.close()
    with pytest.raises(HandshakeError, match=f"no connection to 127.0.0.1:{port}"):
        await to(port)


async def test_a_frame_that_is_too_large_is_refused_before_it_is_read():
    async with server(echo) as port:
        stream = await to(port, limit=LIMIT * 4)
        with pytest.raises(FrameError):
            await stream.send(bytes(LIMIT * 4 + 1))
        await stream.send(bytes(LIMIT + 1))
        with pytest.raises(PeerClosedError):
            await stream.recv()


async def test_a_sender_waits_for_its_reader():
    sent = 0

    async def pour(stream: FrameStream) -> None:
        nonlocal sent
        with contextlib.suppress(PeerClosedError):
            while True:
                await stream.send(bytes(100_000))
                sent += 1

    async with server(pour) as port:
        stream = await to(port)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert 0 < sent < 200
        for _ in range(sent + 1):
            await stream.recv()
        stream.close()
        await asyncio.sleep(0.1)
        before = sent
        await asyncio.sleep(0.1)
        assert sent == before
