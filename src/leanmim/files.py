"""Files that are whole or not there, and lines that are added to one."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from leanmim.errors import CannotWrite

ELSEWHERE = "choose a place that can be written"
REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: ELSEWHERE,
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
}


def cannot_write(path: Path, error: OSError, size: int = 0) -> CannotWrite:
    """What to tell of a fault of the disk.

    Args:
        path: what could not be written.
        error: what the system says.
        size: bytes that it takes, if known.
    """
    free = shutil.disk_usage(existing(path)).free
    room = f" (it takes {megabytes(size)}, {megabytes(free)} are free)" if size else ""
    return CannotWrite(
        f"{str(path)!r} cannot be written: {error.strerror or error}{room}. What was there before stays; "
        f"{REMEDIES.get(error.errno or 0, 'see to the disk')}, then give the same command again"
    )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def megabytes(size: int) -> str:
    """Bytes, for people to read."""
    return f"{size / 2**20:,.1f} MiB"


def readable(size: int | float) -> str:
    """Bytes for people, in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def write_atomically(
    path: Path, write: Callable[[Path], Any], before: Callable[[], Any] | None = None, size: int = 0
) -> None:
    """Let ``write`` fill a temporary file next to ``path``, flush it to disk, then rename it; if it fails, remove it.

    Args:
        path: the file.
        write: fills the file that it is given.
        before: called when all is on the disk, before it is renamed.
        size: bytes that it takes, if known.

    Raises:
        CannotWrite: the disk is full, read-only, over quota, or gone.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if before:
            before()
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error, size) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. Errors as for `write_atomically`."""
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=2) + "\n"))


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write JSON atomically, one value a line. Errors as for `write_atomically`."""
    text = "".join(json.dumps(value) + "\n" for value in values)
    write_atomically(path, lambda file: file.write_text(text))


def readable_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; a line that a crash left torn or garbled is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):  # also of bytes that are no UTF-8
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]


def readable_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def writable(folder: Path) -> bool:
    """Whether files can be written in a folder, or where it would be made."""
    try:
        with TemporaryFile(dir=existing(folder)):
            return True
    except OSError:
        return False


def append_line(path: Path, value: Any) -> None:
    """Add a JSON object to a file as a line of its own, whatever a crash left at the end."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(value) + "\n").encode())
