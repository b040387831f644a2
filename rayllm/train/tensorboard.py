"""A run's figures as TensorBoard reads them, under the names of metrics.parquet. Knows no tensors and no ranks."""

import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """A file of its own for each start of a run, in its folder. Of steps after `first_step`, which an earlier start may
    have told of, TensorBoard forgets what that said."""

    def __init__(self, run: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # brings torch, and half a second of imports
        from tensorboardX.proto.event_pb2 import SessionLog

        self._writer = EventsWriter(str(run / "events"), f".{time.time_ns()}")
        self._write(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """On the disk when it returns."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(step, summary=Summary(value=values))

    def _write(self, step: int, **content: object) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
