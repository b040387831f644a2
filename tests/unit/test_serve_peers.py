"""How a replica keeps track of its peers when they, their addresses or the directory are not what they should be."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import msgspec
import pytest

from rayllm.core.types import Request, SamplingParams
from rayllm.engine.outputs import OutputDelta
from rayllm.serve import peer as peer_module
from rayllm.serve import peers as peers_module
from rayllm.serve.local_state import LocalState
from rayllm.serve.peer import Address, Peer, PeerLostError
from rayllm.serve.peer_messages import Done, Run, encode
from rayllm.serve.peer_server import PeerServer
from rayllm.serve.peers import Peers
from rayllm.serve.replica_state import Snapshot
from rayllm_cluster.errors import PeerClosedError
from rayllm_cluster.streams import FrameStream, connect, serve
from tests.unit.test_serve_replica_state import Cache

KEY = secrets.token_bytes(32)
LIMIT = 1 << 20
REQUEST = Request(request_id="r", prompt_token_ids=(1,), params=SamplingParams())
STATE = encode(
    Snapshot(weight_version="v", queued_tokens=0, running=0, is_full=False, is_draining=False).since(frozenset())
)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "_LOOK_S", 0.02)
    monkeypatch.setattr(peer_module, "_AGAIN_S", 0.02)


class Listed:
    """The directory."""

    def __init__(self, **addresses: Address) -> None:
        self.addresses = addresses
        self.error: Exception | None = None
        self.looks = 0
        self.cleaned = 0

    def join(self, name: str, address: Address) -> None:
        self.addresses[name] = address

    def leave(self, name: str) -> None:
        del self.addresses[name]

    def replicas(self) -> dict[str, Address]:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return dict(self.addresses)

    def clean(self) -> None:
        self.cleaned += 1


@contextmanager
def running(work: Awaitable[None]) -> Iterator[asyncio.Task[None]]:
    task = asyncio.ensure_future(work)
    yield task
    task.cancel()


@asynccontextmanager
async def listening(name: str, handle: Callable[[FrameStream], Awaitable[None]]) -> AsyncIterator[Address]:
    server = await serve("127.0.0.1", handle, key=KEY, name=name, limit=LIMIT)
    yield server.sockets[0].getsockname()[:2]
    server.close()


def replica() -> PeerServer:
    async def answer(request: Request, cached_tokens: int) -> AsyncGenerator[OutputDelta, None]:
        return
        yield

    return PeerServer(
        answer, lambda request_id: False, LocalState(Cache(), block_size=4, max_num_seqs=3, is_draining=lambda: False)
    )


def peers_of(directory: Listed) -> Peers:
    return Peers(directory, own_name="a", key=KEY, lost=lambda name: None)


def peer_at(address: Address) -> Peer:
    return Peer("b", address, own_name="a", key=KEY, lost=lambda name: None)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_port_that_another_replica_has_now():
    """b died without leaving, and c was given its port."""
    async with listening("c", replica().handle) as address:
        directory = Listed(b=address, c=address)
        peers = peers_of(directory)
        with running(peers.follow()):
            await until(lambda: directory.cleaned)
            assert [peer.name for peer in peers.known()] == ["c"]


@pytest.mark.parametrize("error", [OSError("as Ray raises for some"), ValueError("and for others")])
async def test_a_directory_that_cannot_be_read_is_read_again(error: Exception):
    server, directory = replica(), Listed()
    peers = peers_of(directory)
    with running(peers.follow()) as following:
        async with listening("b", server.handle) as directory.addresses["b"]:
            await until(peers.known)
            directory.error = error
            looks = directory.looks
            await until(lambda: directory.looks > looks + 2)
            assert peers.known(), "those that are known stay"
            directory.error = None
            directory.addresses.clear()
        server.close()  # nobody listens any more, so it is not found again between two looks
        await until(lambda: not peers.all())
        assert not following.done()


async def test_a_replica_that_was_taken_out_joins_again_until_it_leaves():
    """Another one takes out whom Ray does not name, and Ray may have named nobody for a moment."""
    directory = Listed()
    peers = peers_of(directory)
    await peers.join(("10.0.0.1", 5))
    with running(peers.follow()):
        for _ in range(2):
            directory.addresses.clear()
            await until(lambda: directory.addresses == {"a": ("10.0.0.1", 5)})
        await peers.leave()
        looks = directory.looks
        await until(lambda: directory.looks > looks + 3)
        assert not directory.addresses


async def test_a_peer_that_answers_what_was_not_asked_is_lost():
    async def handle(stream: FrameStream) -> None:
        with suppress(PeerClosedError):
            while True:
                is_watch = b"watch" in await stream.recv()
                await stream.send(STATE)
                await asyncio.sleep(0.05)
                await stream.send(encode(Done()) if is_watch else STATE)

    async with listening("b", handle) as address:
        peer = peer_at(address)
        with running(peer.watch()) as watching:
            for _ in range(2):
                await until(lambda: peer.view is not None)
                await until(lambda: peer.view is None)
            assert not watching.done()
            with pytest.raises(PeerLostError):
                await anext(peer.run(REQUEST, 0))


async def test_a_peer_that_is_not_reached_is_told_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    server = replica()
    async with listening("b", server.handle) as address:
        pass  # nobody listens there any more
    peer = peer_at(address)
    with running(peer.watch()):
        await until(lambda: caplog.messages)
        await asyncio.sleep(0.1)
    assert [message.split(":")[0] for message in caplog.messages] == ["replica b is not reached"]
    caplog.clear()
    async with listening("b", server.handle) as peer.address:
        with running(peer.watch()):
            await until(lambda: peer.view is not None)
            server.close()
            await until(lambda: caplog.messages)
            await until(lambda: peer.view is not None)
    assert [message.split(":")[0] for message in caplog.messages] == ["replica b is lost"]


async def test_replicas_that_came_and_went_leave_nothing():
    server = replica()
    async with listening("b", server.handle) as address:
        for number in range(20):
            stream = await connect(*address, key=KEY, name=f"replica-{number}", limit=LIMIT)
            await until(lambda: server._streams)
            stream.close()
            await until(lambda: not server._streams)


async def test_a_request_that_is_none_is_refused_in_one_line(caplog: pytest.LogCaptureFixture):
    async with listening("b", replica().handle) as address:
        stream = await connect(*address, key=KEY, name="a", limit=LIMIT)
        run = msgspec.msgpack.decode(encode(Run.of(REQUEST, 0)))
        run["request"]["params"]["temperature"] = -1.0
        await stream.send(msgspec.msgpack.encode(run))
        with pytest.raises(PeerClosedError):
            await stream.recv()
        await until(lambda: caplog.messages)
    assert caplog.messages == ["a connection of replica a is closed: temperature: -1.0 is not in [0, 100]"]
