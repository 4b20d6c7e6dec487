"""Files that grow entry by entry while a run goes on, and that a full disk only delays."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path


class GrowingFile:
    """Entries are added whole or not at all. What the disk refuses is kept, and added before what
    comes later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[bytes] = []

    def add(self, entry: bytes) -> None:
        """Have it written at the next `write`."""
        self._kept.append(entry)

    def write(self) -> None:
        """Raises OSError, with all that is not in the file kept."""
        if not self._kept:
            return
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                left = memoryview(b"".join(self._kept))
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)
                raise
        self._kept = []


class EventFile(GrowingFile):
    """TensorBoard's, with a run's metrics; of those in other files of its folder, the steps from
    `purge_step` on are hidden."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        super().__init__(folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}")
        self._event = Event
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one step's."""
        event = self._event(wall_time=time.time(), step=step)
        for name, value in metrics.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._add(event)

    def _add(self, event: object) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())  # type: ignore[attr-defined]
        self.add(record.getvalue())


def write_whole(file: Path, data: bytes) -> None:
    """All of it or nothing, for those who read it meanwhile or after a kill. Raises OSError."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
