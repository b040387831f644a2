"""Frames and channels: any cutting of the stream gives the frames that were sent, and nothing else is taken for one."""

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm_cluster.channel import Channel, Frame, FrameDecoder, FrameKind, encode_frame
from rayllm_cluster.errors import FrameError, PeerClosedError

LIMIT = 1 << 10

frames = st.lists(st.builds(Frame, st.sampled_from(FrameKind), st.binary(max_size=200)), max_size=8)


def drain(decoder: FrameDecoder) -> list[Frame]:
    taken = []
    while (frame := decoder.next()) is not None:
        taken.append(frame)
    return taken


@given(frames, st.data())
def test_frames_survive_any_cutting(sent: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(frame.payload, epoch=3, kind=frame.kind) for frame in sent)
    decoder = FrameDecoder(epoch=3, limit=LIMIT)
    received = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        decoder.feed(stream[:cut])
        received += drain(decoder)
        stream = stream[cut:]
    assert received == sent
    assert decoder.pending_bytes == 0


@given(st.binary(max_size=64))
def test_noise_is_a_frame_of_this_epoch_or_refused(noise: bytes) -> None:
    decoder = FrameDecoder(epoch=7, limit=LIMIT)
    decoder.feed(noise)
    try:
        taken = drain(decoder)
    except FrameError:
        return
    rest = noise[len(noise) - decoder.pending_bytes :]
    assert b"".join(encode_frame(f.payload, epoch=7, kind=f.kind) for f in taken) + rest == noise
    assert len(rest) < 9 or struct.unpack_from("!II", rest)[1] == 7


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (struct.pack("!IIB", 4, 6, 0), "epoch 6 in epoch 7"),
        (struct.pack("!IIB", LIMIT + 1, 7, 0), f"{LIMIT + 1} bytes"),
        (struct.pack("!IIB", 0xFFFFFFFF, 7, 0), "4294967295 bytes"),
        (struct.pack("!IIB", 4, 7, len(FrameKind)), f"kind {len(FrameKind)}"),
    ],
)
def test_a_bad_header_is_refused_before_its_payload(header: bytes, problem: str) -> None:
    decoder = FrameDecoder(epoch=7, limit=LIMIT)
    decoder.feed(header)
    with pytest.raises(FrameError, match=problem):
        decoder.next()


def test_a_frame_that_is_too_large_is_not_sent() -> None:
    encode_frame(b"x" * LIMIT, epoch=0, limit=LIMIT)
    with pytest.raises(FrameError, match=f"{LIMIT + 1} bytes"):
        encode_frame(b"x" * (LIMIT + 1), epoch=0, limit=LIMIT)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    yield here, there
    here.close()
    there.close()


def test_both_directions(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = (Channel(end, epoch=1) for end in ends)
    here.send(b"batch")
    assert there.recv() == Frame(FrameKind.DATA, b"batch")
    there.send(b"", FrameKind.READY)
    there.send(b"x" * 100_000)
    assert here.recv() == Frame(FrameKind.READY, b"")
    assert here.recv() == Frame(FrameKind.DATA, b"x" * 100_000)
    assert here.recv_some() == []


def test_a_large_frame_waits_for_its_reader(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = (Channel(end, epoch=1) for end in ends)
    payload = bytes(range(256)) * (1 << 14)  # 4 MiB, more than any socket buffer
    sender = threading.Thread(target=here.send, args=(payload,))
    sender.start()
    assert there.recv().payload == payload
    sender.join()


@pytest.mark.parametrize("cut", [1, 8, 9, 12])
def test_an_end_within_a_frame_is_told_apart(ends: tuple[socket.socket, socket.socket], cut: int) -> None:
    here, there = ends
    here.sendall(encode_frame(b"payload", epoch=1)[:cut])
    here.close()
    with pytest.raises(PeerClosedError, match=f"within a frame, after {cut} bytes"):
        Channel(there, epoch=1).recv()


def test_an_end_between_frames(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = (Channel(end, epoch=1) for end in ends)
    here.send(b"last")
    here.close()
    assert there.recv().payload == b"last"
    with pytest.raises(PeerClosedError):
        there.recv()
    with pytest.raises(PeerClosedError):
        there.send(b"too late")
    with pytest.raises(PeerClosedError):
        there.send_some(memoryview(b"too late"))
