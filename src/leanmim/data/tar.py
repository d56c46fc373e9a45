"""Images in tar files: what `leanmim pack` writes, and WebDataset's shards.

A file is read at random, so order, crops and continuation are those of a folder. Members that are no images are passed over.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from glob import glob
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from leanmim.config.base import Stored
from leanmim.data.find import ARRAY, FORMATS, SUFFIXES
from leanmim.data.read import MAX_BYTES, Choose, Cut, Picture, read_cut, read_image
from leanmim.data.shards import Shards
from leanmim.data.source import REMEDY, UNREACHABLE, Away, is_pattern
from leanmim.data.stored import array_of
from leanmim.errors import UserError

BLOCK = 512  # bytes, of which a tar file consists
MAGIC = b"leanmim pack 1 "
"""How the last block of a pack's index begins; the index's place and length follow."""
OWN = "leanmim/"
"""Members below it are not images: the options of the pack, its index, the files that could not be read."""


class Index(NamedTuple):
    """Where the images of a tar file are."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]

    def add(self, name: str, offset: int, size: int) -> None:
        """One more."""
        for column, value in zip(self, (name, offset, size), strict=True):
            column.append(value)  # type: ignore[attr-defined]


def read_index(path: Path) -> Index:
    """The images of a tar file: by its own index if `leanmim pack` wrote one, else by a walk over its members.

    Raises:
        UserError: it cannot be read, is no tar file, ends too early, or holds no images.
    """
    try:
        facts = os.stat(path)
        index = known_index(path, facts.st_size, facts.st_mtime_ns)
    except (OSError, tarfile.TarError, ValueError, TypeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a tar file ({error}); write or download it again") from error
    if late := [name for name, start, size in zip(*index, strict=True) if start + size > facts.st_size]:
        raise UserError(
            f"{str(path)!r} ends too early, {len(late)} of its {len(index.names)} images are missing; write or download it again"
        )
    if not index.names:
        raise UserError(f"{str(path)!r} holds no images; leanmim reads {FORMATS}")
    return index


@lru_cache(8)
def known_index(path: Path, size: int, written: int) -> Index:
    """That of a file of this size, written then: a command asks several times.

    Raises:
        ValueError: what it holds as an index is none.
    """
    index = own_index(path) or walked(path)
    for _, start, length in zip(*index, strict=True):
        if not (type(start) is type(length) is int and start >= 0 and length >= 0):
            raise ValueError("its index is damaged")
    return index


def own_index(path: Path) -> Index | None:
    """What `leanmim pack` wrote at the end; None if it did not."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - tarfile.RECORDSIZE - BLOCK))
        last = file.read()
        begins = last.rfind(MAGIC)
        if begins < 0:
            return None
        start, length = map(int, last[begins + len(MAGIC) :].split(b"\n")[0].split())
        file.seek(start)
        return Index(**json.loads(file.read(length)))


def walked(path: Path) -> Index:
    """The images among the members, in the file's order; arrays only where there is nothing else: beside images they are
    something else, such as features.
    """
    images, arrays = Index([], [], []), Index([], [], [])
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile() and is_image(member.name):
                part = arrays if member.name.endswith(ARRAY) else images
                part.add(member.name, member.offset_data, member.size)
    return images if images.names else arrays


def is_image(name: str) -> bool:
    """Whether a member is one, by its suffix; hidden ones and our own notes are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES | {ARRAY} and not path.name.startswith(".") and not name.startswith(OWN)


class Tar(Shards):
    """The images of tar files, one file after the other; with several, names begin with the file's: shard-0/a.jpg.

    Args:
        paths: of the files.
        channels: 1 to 16; `Stored` ones are not converted to 8 bits.

    Raises:
        UserError: see `read_index`.
    """

    def __init__(self, paths: Sequence[str | Path], channels: int) -> None:
        indices = [read_index(Path(path)) for path in paths]
        stems = [f"{Path(path).stem}/" if len(paths) > 1 else "" for path in paths]
        names = (stem + name for stem, index in zip(stems, indices, strict=True) for name in index.names)
        places = [
            (file, *place)
            for file, index in enumerate(indices)
            for place in zip(index.offsets, index.sizes, strict=True)
        ]
        super().__init__(paths[0], paths, names, np.array(places), channels)

    @property
    def sizes(self) -> list[int | None]:
        """Bytes of every image."""
        return self.places[:, 2].tolist()

    def where(self, index: int) -> str:
        """File and member."""
        return f"{self.paths[self.places[index, 0]]}: {self._names[index]}"

    def read(self, index: int) -> Picture:
        """A member as a picture.

        Raises:
            UNREADABLE: it is broken.
            Away: the tar file cannot be reached.
        """
        name, data = self._names[index], self.bytes_of(index)
        if self.raw(name):
            pixels = array_of(data, self.channels)
            return Image.fromarray(pixels if self.channels == 3 else pixels[..., 0])
        return read_image(name, self.channels, data)

    def cut(self, index: int, choose: Choose, size: tuple[int, int]) -> Cut:
        """A member for the sake of a box in it, see `read_cut`. Errors as for `read`."""
        name, data = self._names[index], self.bytes_of(index)
        if self.raw(name):
            pixels = array_of(data, self.channels)
            return Cut(pixels, choose(pixels.shape[1], pixels.shape[0]))
        return read_cut(name, self.channels, choose, size, data)

    def raw(self, name: str) -> bool:
        """Whether a member is the pixels of an 8-bit picture, which nothing has to decode."""
        return name.endswith(ARRAY) and not isinstance(self.channels, Stored)

    def bytes_of(self, index: int) -> bytes:
        """What a member holds. Read, not mapped: of a mapped file on a drive that goes away the system kills the process."""
        file, start, size = self.places[index].tolist()
        path = self.paths[file]
        if size > MAX_BYTES:
            raise OSError(f"it has {size} bytes, more than {MAX_BYTES}")
        try:
            with open(path, "rb", buffering=0) as opened:
                opened.seek(start)
                data = opened.read(size)
        except OSError as error:
            if error.errno in UNREACHABLE or isinstance(error, FileNotFoundError):
                raise Away(f"the images are away: {path} cannot be reached ({error.strerror}){REMEDY}") from error
            raise
        if len(data) < size:
            raise OSError(f"{path} ends before the end of {self._names[index]}")
        return data


def open_tar(data: str, channels: int) -> Tar | None:
    """The source of a tar file, or of all that match a pattern; None if --data names something else."""
    paths = sorted(glob(data, recursive=True)) if is_pattern(data) and not os.path.exists(data) else [data]
    return Tar(paths, channels) if paths and all(map(is_tar, paths)) else None


def is_tar(path: str | Path) -> bool:
    """Whether it is a tar file, by its name."""
    return Path(path).suffix.lower() == ".tar" and os.path.isfile(path)
