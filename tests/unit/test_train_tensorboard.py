"""TensorBoard's event files: whole after every step, the figures of metrics.parquet, an earlier start undone."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rayllm.train.progress import METRICS, ProgressWriter
from tests.progress_rows import progress


def crc32c(data: bytes) -> int:
    """Castagnoli's, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """As TensorFlow's records have it (tensorflow/core/lib/hash/crc32c.h)."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(path: Path) -> Iterator[Event]:
    content = path.read_bytes()
    while content:
        (length, length_crc), rest = struct.unpack("<QI", content[:12]), content[12:]
        data, (data_crc,), content = rest[:length], struct.unpack("<I", rest[length : length + 4]), rest[length + 4 :]
        assert (masked(struct.pack("<Q", length)), masked(data)) == (length_crc, data_crc)
        yield Event.FromString(data)


def figures(event: Event) -> dict[str, float]:
    return {value.tag: value.simple_value for value in event.summary.value}


def test_crc_of_the_rfc() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_every_figure_after_every_step(tmp_path: Path) -> None:
    writer = ProgressWriter(tmp_path, 0)
    before = time.time()
    for step in (1, 2):
        writer.add(progress(step, 2.5 / step, margin=0.5 * step))
        [path] = tmp_path.glob("events.out.tfevents.*")
        version, begun, *told = events(path)  # also while the run goes on
        assert version.file_version == "brain.Event:2"
        assert (begun.session_log.status, begun.step) == (SessionLog.START, 1)
        assert [event.step for event in told] == list(range(1, step + 1))
        assert before - 1 < told[-1].wall_time < time.time() + 1
    writer.close()
    [_, _, *told] = events(path)
    for event, row in zip(told, pq.read_table(tmp_path / METRICS).to_pylist(), strict=True):
        expected = {name: row[name] for name in row if name not in ("step", "steps", "pid", "mfu")}
        assert figures(event) == pytest.approx(expected, rel=1e-6)  # events are float32
        assert figures(event)["margin"] == 0.5 * event.step


def test_a_new_start_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = ProgressWriter(tmp_path, 0)
    for step in (1, 2, 3):
        first.add(progress(step, 1.0))
    first.flush()
    again = ProgressWriter(tmp_path, 2)
    again.add(progress(3, 4.0))
    again.close()
    earlier, later = sorted(tmp_path.glob("events.out.tfevents.*"))  # TensorBoard reads them in this order
    assert [event.step for event in events(earlier)] == [0, 1, 1, 2, 3]
    _, begun, told = events(later)
    assert (begun.session_log.status, begun.step, told.step) == (SessionLog.START, 3, 3)
    assert figures(told)["loss"] == 4.0
