"""Only who knows the key, for this epoch, becomes a member; anybody else costs a fixed number of bytes."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm_cluster import handshake
from rayllm_cluster.errors import HandshakeError
from rayllm_cluster.handshake import Listener, connect, introduce, welcome

KEY = bytes(range(32))
OTHER_KEY = bytes(32)


def both(driver: Callable[[socket.socket], object], shard: Callable[[socket.socket], object]) -> list[object]:
    """What each half returned or raised: the driver's first."""
    here, there = socket.socketpair()
    outcome: list[object] = [None, None]

    def run(index: int, half: Callable[[socket.socket], object], end: socket.socket) -> None:
        with end:
            try:
                outcome[index] = half(end)
            except HandshakeError as error:
                outcome[index] = error

    thread = threading.Thread(target=run, args=(1, shard, there))
    thread.start()
    run(0, driver, here)
    thread.join()
    return outcome


def test_a_member_is_known_by_its_rank() -> None:
    outcome = both(lambda end: welcome(end, key=KEY, epoch=4), lambda end: introduce(end, key=KEY, rank=2, epoch=4))
    assert outcome == [2, None]


def test_a_wrong_key_is_refused_by_both() -> None:
    driver, shard = both(
        lambda end: welcome(end, key=KEY, epoch=4), lambda end: introduce(end, key=OTHER_KEY, rank=2, epoch=4)
    )
    assert "does not know the group's key" in str(driver)
    assert isinstance(shard, HandshakeError)


def test_another_epoch_is_refused_by_both() -> None:
    driver, shard = both(
        lambda end: welcome(end, key=KEY, epoch=5), lambda end: introduce(end, key=KEY, rank=2, epoch=4)
    )
    assert "rank 2 of epoch 4 in epoch 5" in str(driver)
    assert isinstance(shard, HandshakeError)


def test_a_driver_that_echoes_is_no_driver() -> None:
    def echo(end: socket.socket) -> None:
        end.sendall(bytes(32))
        hello = end.recv(1 << 10)
        end.sendall(hello[-32:])  # the shard's own proof

    _, shard = both(echo, lambda end: introduce(end, key=KEY, rank=0, epoch=0))
    assert "driver does not know the group's key" in str(shard)


@given(st.binary(max_size=100))
def test_noise_is_no_member(noise: bytes) -> None:
    def talk(end: socket.socket) -> None:
        end.sendall(noise)
        end.shutdown(socket.SHUT_WR)

    driver, _ = both(lambda end: welcome(end, key=KEY, epoch=0), talk)
    assert isinstance(driver, HandshakeError)


def test_silence_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.05)
    here, there = socket.socketpair()
    with here, there, pytest.raises(HandshakeError, match="timed out"):
        welcome(here, key=KEY, epoch=0)


@pytest.mark.parametrize("same_node", [True, False])
def test_listener_turns_strangers_away_and_leaves_nothing(same_node: bool) -> None:
    listener = Listener(key=KEY, epoch=0, tcp_host="127.0.0.1")
    address = listener.address(same_node=same_node)
    connections: list[socket.socket] = []

    def shard(key: bytes) -> None:
        try:
            connections.append(connect(address, key=key, rank=1, epoch=0))
        except HandshakeError:
            return

    for key, expected in ((OTHER_KEY, None), (KEY, 1)):
        thread = threading.Thread(target=shard, args=(key,))
        thread.start()
        member = listener.accept(5.0)
        thread.join()
        assert (None if member is None else member[0]) == expected
        if member is not None:
            connections.append(member[1])
    assert listener.accept(0.0) is None
    listener.close()
    for connection in connections:
        connection.close()
    if isinstance(address, str):
        assert not Path(address).parent.exists()
    with pytest.raises(HandshakeError, match="cannot connect"):
        connect(address, key=KEY, rank=1, epoch=0)


def test_the_socket_is_for_its_owner_alone() -> None:
    listener = Listener(key=KEY, epoch=0)
    path = listener.address(same_node=True)
    assert isinstance(path, str)
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    listener.close()
