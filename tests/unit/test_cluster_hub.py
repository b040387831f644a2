"""The driver's end of several channels, with socket pairs in place of processes."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from rayllm_cluster.channel import Channel, FrameKind
from rayllm_cluster.errors import GroupClosedError, RemoteError, ShardLostError, ShardStalledError
from rayllm_cluster.hub import DIED, Hub


class Pairs:
    def __init__(self, size: int, epoch: int = 2) -> None:
        pairs = [socket.socketpair() for _ in range(size)]
        self.hub = Hub([Channel(here, epoch=epoch) for here, _ in pairs])
        self.sockets = [there for _, there in pairs]
        self.shards = [Channel(there, epoch=epoch) for there in self.sockets]


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    pairs = Pairs(3)
    yield pairs
    pairs.hub.close()
    for shard in pairs.shards:
        shard.close()


def test_broadcast_and_answers_by_rank(pairs: Pairs) -> None:
    pairs.hub.broadcast(b"step", timeout_s=1)
    assert [shard.recv().payload for shard in pairs.shards] == [b"step"] * 3
    pairs.hub.send(1, b"only you", kind=FrameKind.PORT, timeout_s=1)
    assert pairs.shards[1].recv() == (FrameKind.PORT, b"only you")
    for rank in (2, 0, 1):
        pairs.shards[rank].send(b"%d" % rank)
    pairs.shards[2].send(b"again")
    assert [pairs.hub.recv(rank, timeout_s=1) for rank in (0, 1, 2, 2)] == [b"0", b"1", b"2", b"again"]


def test_no_answer_in_time(pairs: Pairs) -> None:
    pairs.shards[0].send(b"not the one waited for")
    with pytest.raises(ShardStalledError, match=r"shard 1: no answer within 0\.05 s"):
        pairs.hub.recv(1, timeout_s=0.05)


def test_a_death_is_noticed_while_another_is_waited_for(pairs: Pairs) -> None:
    pairs.shards[2].close()
    with pytest.raises(ShardLostError) as caught:
        pairs.hub.recv(0, timeout_s=5)
    assert (caught.value.rank, caught.value.cause, caught.value.error) == (2, DIED, None)


def test_a_death_is_noticed_by_sending(pairs: Pairs) -> None:
    pairs.shards[1].close()
    with pytest.raises(ShardLostError, match=f"shard 1: {DIED}"):
        pairs.hub.broadcast(b"step", timeout_s=1)


def test_last_words_are_heard(pairs: Pairs) -> None:
    pairs.shards[1].send(RemoteError("ValueError", "torn page").encode(), FrameKind.ERROR)
    pairs.shards[1].close()
    with pytest.raises(ShardLostError, match="shard 1: ValueError: torn page") as caught:
        pairs.hub.broadcast(b"step", timeout_s=1)
    assert caught.value.error == ("ValueError", "torn page")


def test_a_death_is_the_cause_of_an_error_that_is_read_first(pairs: Pairs) -> None:
    pairs.shards[0].send(RemoteError("RuntimeError", "Connection closed by peer").encode(), FrameKind.ERROR)
    death = threading.Timer(0.02, pairs.shards[2].close)
    death.start()
    with pytest.raises(ShardLostError, match=f"shard 2: {DIED}"):
        pairs.hub.recv(0, timeout_s=5)
    death.join()


def test_a_frame_of_another_epoch_loses_the_group(pairs: Pairs) -> None:
    Channel(pairs.sockets[1], epoch=1).send(b"from an earlier life")
    with pytest.raises(ShardLostError, match="shard 1: a frame of epoch 1 in epoch 2"):
        pairs.hub.recv(0, timeout_s=5)


def test_a_frame_of_the_wrong_kind_loses_the_group(pairs: Pairs) -> None:
    pairs.shards[1].send(b"", FrameKind.READY)
    with pytest.raises(ShardLostError, match="shard 1: sent READY where DATA was due"):
        pairs.hub.recv(1, timeout_s=5)


def test_a_shard_that_does_not_read(pairs: Pairs) -> None:
    with pytest.raises(ShardStalledError, match="shard 0: does not read"):
        pairs.hub.broadcast(bytes(8 << 20), timeout_s=0.1)


def test_large_frames_both_ways_at_once_do_not_wait_for_each_other(pairs: Pairs) -> None:
    """Each end has more to send than the socket holds, and the shard reads only when it has sent."""
    large = bytes(8 << 20)

    def shard() -> None:
        pairs.shards[0].send(large)
        assert pairs.shards[0].recv().payload == large

    thread = threading.Thread(target=shard)
    thread.start()
    pairs.hub.send(0, large, timeout_s=10)
    assert pairs.hub.recv(0, timeout_s=10) == large
    thread.join()


def test_wake_ends_a_blocked_call_and_refuses_later_ones(pairs: Pairs) -> None:
    waker = threading.Timer(0.05, pairs.hub.wake)
    waker.start()
    before = time.monotonic()
    with pytest.raises(GroupClosedError):
        pairs.hub.recv(0, timeout_s=30)
    assert time.monotonic() - before < 25
    with pytest.raises(GroupClosedError):
        pairs.hub.recv(0, timeout_s=30)
    waker.join()
    pairs.hub.wake()
    pairs.hub.close()
    pairs.hub.close()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first\nsecond"), "ValueError: first"),
        (KeyError(), "KeyError"),
        (RuntimeError("한국어 \udc80"), "RuntimeError: 한국어 ?"),
    ],
)
def test_an_exception_travels_as_one_line(error: Exception, line: str) -> None:
    assert str(RemoteError.decode(RemoteError.of(error).encode())) == line
