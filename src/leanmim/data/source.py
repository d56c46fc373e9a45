"""Where images come from. To everybody else a source has a length, names, and `read(index)`."""

import os
from collections.abc import Callable, Iterable, Sequence
from glob import iglob
from itertools import takewhile
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from leanmim.data.find import list_images, match_images, read_list
from leanmim.data.read import read_image


@runtime_checkable
class Source(Protocol):
    """Images in a fixed order."""

    @property
    def names(self) -> Sequence[str]:
        """What each image is called within the source; the same wherever the source is moved."""
        ...

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def read(self, index: int) -> Image.Image:
        """An image, 8-bit RGB or grey.

        Raises:
            UNREADABLE: it cannot be read. It must be one of these exceptions (OSError, ValueError, ...): training then
                takes another image and lists this one; any other exception ends the run.
        """
        ...

    def where(self, index: int) -> str:
        """How a message calls the image: a path, for example."""
        ...


class Files:
    """Image files, converted to ``channels``, 1 or 3; names are paths relative to ``root``."""

    def __init__(self, root: str | Path, names: Iterable[str | Path], channels: int) -> None:
        self.root, self.channels = Path(root), channels
        # one string, not a million Python objects: forked workers then share it instead of copying it
        self._names = np.array([os.fspath(name) for name in names])

    @property
    def names(self) -> list[str]:
        """Paths below the root."""
        return self._names.tolist()

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        """The file's path."""
        return str(Path(self.root, self._names[index]))

    def read(self, index: int) -> Image.Image:
        """The file as a picture."""
        return read_image(self.where(index), self.channels)


class Folder(Files):
    """Every image file below a folder, sorted by path.

    Raises:
        UserError: the folder is missing, empty, or holds no images.
    """

    def __init__(self, root: str | Path, channels: int) -> None:
        super().__init__(root, (file.relative_to(root) for file in list_images(root)), channels)


class Joined:
    """Several sources, one after the other; names begin with the position of the source: 0/a.jpg, 1/a.jpg.

    A file that several sources hold counts once, with the first of them.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        places: dict[object, tuple[int, int]] = {}  # file: position of its source, index there
        for position, source in enumerate(sources):
            for index in range(len(source)):
                place = (position, index)
                places.setdefault(os.path.realpath(source.where(index)) if isinstance(source, Files) else place, place)
        self._places = np.array(list(places.values()))

    @property
    def names(self) -> list[str]:
        """Position of the source, and the name there."""
        names = [source.names for source in self.sources]
        return [f"{position}/{names[position][index]}" for position, index in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        """What the image's source says."""
        position, own = self._places[index].tolist()
        return self.sources[position].where(own)

    def read(self, index: int) -> Image.Image:
        """What the image's source reads."""
        position, own = self._places[index].tolist()
        return self.sources[position].read(own)


Opener = Callable[[str, int], "Source | None"]
SOURCES: list[Opener] = []
"""Asked in turn whether they open a value of --data, with so many channels; None is no. Third parties may add to it. What
nobody opens is a list, a pattern or a folder."""


def open_source(data: str | Sequence[str], channels: int) -> Source:
    """The source that --data names; several values are joined.

    Raises:
        UserError: there is none, or it holds no images.
    """
    sources = [open_one(value, channels) for value in ([data] if isinstance(data, str) else data)]
    return sources[0] if len(sources) == 1 else Joined(sources)


def open_one(data: str, channels: int) -> Source:
    """The source that one value of --data names.

    Raises:
        UserError: there is none, or it holds no images.
    """
    found = (opener(data, channels) for opener in SOURCES)
    if (source := next((source for source in found if source is not None), None)) is not None:
        return source
    path = Path(data)
    if path.is_file() and path.suffix.lower() == ".txt":
        return Files(path.parent, read_list(path), channels)
    if not path.exists() and is_pattern(data):
        root = Path(*takewhile(lambda part: not is_pattern(part), path.parts))
        return Files(root, (file.relative_to(root) for file in match_images(data)), channels)
    return Folder(data, channels)


def absolute(data: str | Sequence[str]) -> str | tuple[str, ...]:
    """--data with absolute paths, for use from any folder; what is no path of an existing file stays as it is."""
    if not isinstance(data, str):
        return tuple(os.path.abspath(value) if leads_somewhere(value) else value for value in data)
    return os.path.abspath(data) if leads_somewhere(data) else data


def leads_somewhere(path: str) -> bool:
    """Whether a file or folder stands there, or matches the pattern."""
    return os.path.exists(path) or any(iglob(path, recursive=True))


def is_pattern(text: str) -> bool:
    """Whether a path has a character that stands for others."""
    return any(character in text for character in "*?[")
