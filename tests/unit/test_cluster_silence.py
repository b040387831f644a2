"""A node that is gone without a word: its network is a namespace of this machine's, and the cable is pulled."""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from rayllm_cluster import channel
from rayllm_cluster.channel import Channel, FrameKind
from rayllm_cluster.errors import PeerClosedError, ShardLostError
from rayllm_cluster.hub import Hub
from rayllm_cluster.streams import FrameStream, connect, serve

HERE, THERE = "10.213.77.1", "10.213.77.2"
NUMBERS = itertools.count()

PEER = f"""
import socket, time
connection = socket.create_connection(({HERE!r}, {{port}}))
connection.sendall(b"hello")
time.sleep(600)
"""


KEY = bytes(32)
STREAM_PEER = f"""
import asyncio
from rayllm_cluster.streams import connect, serve

async def idle(stream):
    await asyncio.sleep(600)

async def main():
    options = dict(key={KEY!r}, name="there", limit=9)
    if {{port}}:
        await idle(await connect({HERE!r}, {{port}}, **options))
    server = await serve({THERE!r}, idle, **options)
    print(server.sockets[0].getsockname()[1], flush=True)
    await idle(None)

asyncio.run(main())
"""


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@dataclass
class Remote:
    hub: Hub
    link: str

    def pull_the_cable(self) -> None:
        ip(f"link set {self.link} down")


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a namespace, and of the cable to it."""
    monkeypatch.setattr(channel, "SILENCE_S", 2)
    link = f"rl{os.getpid()}x{next(NUMBERS)}"
    try:
        ip(f"netns add {link}")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        ip(f"link add {link} type veth peer name eth0 netns {link}")
        ip(f"addr add {HERE}/24 dev {link}")
        ip(f"link set {link} up")
        ip(f"-n {link} addr add {THERE}/24 dev eth0")
        ip(f"-n {link} link set eth0 up")
        yield link
    finally:
        subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
        ip(f"netns del {link}")


@pytest.fixture
def remote(link: str) -> Iterator[Remote]:
    peer = None
    try:
        with socket.create_server((HERE, 0)) as listener:
            listener.settimeout(20)
            script = PEER.format(port=listener.getsockname()[1])
            peer = subprocess.Popen(["ip", "netns", "exec", link, sys.executable, "-c", script])
            connection, _ = listener.accept()
        assert connection.recv(5) == b"hello"
        hub = Hub([Channel(connection, epoch=1)])
        yield Remote(hub, link)
        hub.close()
    finally:
        if peer is not None:
            peer.kill()
            peer.wait()


def test_while_an_answer_is_awaited(remote: Remote) -> None:
    remote.pull_the_cable()
    before = time.monotonic()
    with pytest.raises(ShardLostError, match=r"shard 0: its node does not answer: (connection timed out|no route to)"):
        remote.hub.recv(0, timeout_s=60)
    assert time.monotonic() - before < 10


def test_with_a_step_on_its_way(remote: Remote) -> None:
    remote.pull_the_cable()
    before = time.monotonic()
    remote.hub.broadcast(b"step", timeout_s=60)
    with pytest.raises(ShardLostError, match="shard 0: its node does not answer"):
        remote.hub.recv(0, timeout_s=60)
    assert time.monotonic() - before < 10


def test_found_by_sending(remote: Remote) -> None:
    remote.pull_the_cable()
    time.sleep(4)
    with pytest.raises(ShardLostError, match="shard 0: its node does not answer"):
        remote.hub.broadcast(b"step", timeout_s=60, kind=FrameKind.DATA)


def test_a_process_that_only_does_not_read_is_not_gone(remote: Remote) -> None:
    """A step that computes for long; its kernel answers for it."""
    remote.hub.broadcast(b"step", timeout_s=60)
    time.sleep(5)
    remote.hub.broadcast(b"step", timeout_s=60)


@pytest.mark.parametrize("listens", ["here", "there"])
async def test_while_a_stream_is_read(link: str, listens: str) -> None:
    arrived: asyncio.Queue[FrameStream] = asyncio.Queue()

    async def handle(stream: FrameStream) -> None:
        arrived.put_nowait(stream)
        await asyncio.sleep(600)

    server = await serve(HERE, handle, key=KEY, name="here", limit=9)
    script = STREAM_PEER.format(port=server.sockets[0].getsockname()[1] if listens == "here" else 0)
    command = ["ip", "netns", "exec", link, sys.executable, "-c", script]
    peer = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(20):
            if listens == "here":
                stream = await arrived.get()
            else:
                assert peer.stdout is not None
                stream = await connect(THERE, int(await peer.stdout.readline()), key=KEY, name="here", limit=9)
        await asyncio.sleep(0.5)  # until all that was sent has arrived: the kernel tries again with that for long
        ip(f"link set {link} down")
        async with asyncio.timeout(10):
            with pytest.raises(PeerClosedError):
                await stream.recv()
    finally:
        peer.kill()
        await peer.wait()
        server.close()
