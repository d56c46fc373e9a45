"""What a training leaves line by line: metrics.jsonl, and the same values as TensorBoard events, with the pictures."""

import errno
import io
import json
import os
import shutil
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from leanmim.files import cannot_write, readable_lines
from leanmim.run import Run


class Growing:
    """A file that only grows. What cannot be written is kept until there is room.

    Args:
        path: the file; it and its folder are made when the first bytes are written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.kept = path, bytearray()

    def add(self, data: bytes) -> None:
        """Keep more to write."""
        self.kept += data

    def flush(self) -> None:
        """Write what was added, all of it or nothing.

        Raises:
            CannotWrite: the disk is full, read-only, over quota, or gone.
        """
        if not self.kept:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                before = file.tell()
                if file.write(self.kept) < len(self.kept):  # there was room for a part
                    file.truncate(before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self.path, error, len(self.kept)) from error
        self.kept = bytearray()


class Log:
    """metrics.jsonl, and its values as TensorBoard events.

    The events of a run that is continued are made anew from the lines and the pictures over training time that were kept, so that none
    is missing, doubled or hidden, and the folder holds one file always. Pictures of the end are added when the end is reached.

    Args:
        run: where they are written.
    """

    def __init__(self, run: Run) -> None:
        folder = run.folder / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self.lines = Growing(run.metrics)
        self.events = Growing(folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}")
        self.events.add(record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        for values in readable_lines(run.metrics):
            self.events.add(event(values))
        for step, path in run.strips().items():
            with suppress(OSError, struct.error):  # damaged, gone: the report tells of it
                self.add_picture("reconstructions_over_time", step, path)

    def add(self, values: Mapping[str, int | float]) -> None:
        """Keep a line to write."""
        self.lines.add(as_line(values))
        self.events.add(event(values))

    def add_picture(self, name: str, step: int, file: Path) -> None:
        """Keep a PNG file to show."""
        self.events.add(picture_event(name, step, file.read_bytes()))

    def flush(self) -> None:
        """Write what was added; what cannot be written is kept. Errors as for `Growing.flush`."""
        self.lines.flush()
        self.events.flush()


def as_line(values: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return (json.dumps(values) + "\n").encode()


def event(values: Mapping[str, Any]) -> bytes:
    """A TensorBoard event of the numbers in a line of the log."""
    numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if name != "step"]
    return record(Event(wall_time=time.time(), step=values["step"], summary=Summary(value=numbers)))


def picture_event(name: str, step: int, png: bytes) -> bytes:
    """A TensorBoard event of a PNG picture."""
    width, height = struct.unpack(">II", png[16:24])  # of its header
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    summary = Summary(value=[Summary.Value(tag=name, image=image)])
    return record(Event(wall_time=time.time(), step=step, summary=summary))


def record(message: Event) -> bytes:
    """As it is in an event file."""
    stream = io.BytesIO()
    RecordWriter(stream).write(message.SerializeToString())
    return stream.getvalue()
