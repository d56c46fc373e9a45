"""Where images come from. To everybody else a source has a length, names, and `read(index)`."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import iglob
from itertools import takewhile
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from leanmim.data.find import image_names, match_images, read_list, real_paths
from leanmim.data.read import UNREADABLE, Bad, Choose, Cut, Picture, cut_whole, read_cut, read_image
from leanmim.data.strings import Strings
from leanmim.errors import UserError

UNREACHABLE = {
    getattr(errno, name)
    for name in (
        "EIO", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH",
        "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EREMOTEIO", "ENOMEDIUM",
    )
    if hasattr(errno, name)
}  # fmt: skip
"""What the system says of files on a drive that is away, or damaged."""


REMEDY = "; mount their drive or put them back (one file that stays so is damaged: remove it), then give the same command again"


Read = TypeVar("Read")


class Away(UserError):
    """The images cannot be reached at the moment; a training waits for them, see `loader`."""


def read(source: "Source", place: int) -> Picture | Bad:
    """An image, or why it cannot be read.

    Raises:
        Away: no image can be read at the moment.
    """
    return attempt(source, place, source.read)


def read_box(source: "Source", place: int, choose: Choose, size: tuple[int, int]) -> Cut | Bad:
    """An image for the sake of a box in it, which will be resized to ``size`` (height, width); or why it cannot be read.

    Raises:
        Away: no image can be read at the moment.
    """
    return attempt(source, place, lambda index: cut_of(source, index, choose, size))


def cut_of(source: "Source", index: int, choose: Choose, size: tuple[int, int]) -> Cut:
    """By the source's own method ``cut``, or where it has none from the whole image."""
    if cut := getattr(source, "cut", None):
        return cut(index, choose, size)
    return cut_whole(source.read(index), choose)


def sizes_of(source: "Source") -> list[int | None]:
    """Bytes of every image, None where that is not known; a source may say it by a property ``sizes``."""
    return getattr(source, "sizes", None) or [size_of(source.where(place)) for place in range(len(source))]


def attempt(source: "Source", place: int, how: Callable[[int], Read]) -> Read | Bad:
    """What is read, or why it cannot be."""
    try:
        return how(place)
    except Away:
        raise
    except UNREADABLE as error:
        return Bad(source.where(place), f"{type(error).__name__}: {error}")


def nothing_readable(count: int, first: Bad) -> UserError:
    """The error of a set without any readable image."""
    return UserError(f"none of the {count} image files can be read; the first: {first.path} ({first.reason})")


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

    def read(self, index: int) -> Picture:
        """An image, 8-bit RGB or grey; or an array of stored values, h w c.

        Raises:
            UNREADABLE: it cannot be read. It must be one of these exceptions (OSError, ValueError, ...): training then
                takes another image and lists this one; any other exception ends the run.
            Away: no image can be read at the moment; training waits.
        """
        ...

    def where(self, index: int) -> str:
        """How a message calls the image: a path, for example."""
        ...


class Files:
    """Image files of ``channels``, see `read_image`; names are paths relative to ``root``."""

    def __init__(self, root: str | Path, names: Iterable[str | Path], channels: int) -> None:
        self.root, self.channels = Path(root), channels
        self._names = Strings(os.fspath(name) for name in names)

    @property
    def names(self) -> list[str]:
        """Paths below the root."""
        return list(self._names)

    @property
    def sizes(self) -> list[int | None]:
        """Bytes of every file; None where there is none."""
        return [size_of(os.path.join(self.root, name)) for name in self._names]

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        """The file's path."""
        return str(Path(self.root, self._names[index]))

    def read(self, index: int) -> Picture:
        """The file as a picture.

        Raises:
            UNREADABLE: it is broken, or not there though its root folder is.
            Away: the root folder is missing or empty, or the system says that the drive is away.
        """
        with self.reached(index) as path:
            return read_image(path, self.channels)

    def cut(self, index: int, choose: Choose, size: tuple[int, int]) -> Cut:
        """The file for the sake of a box in it, see `read_cut`. Errors as for `read`."""
        with self.reached(index) as path:
            return read_cut(path, self.channels, choose, size)

    @contextmanager
    def reached(self, index: int) -> Iterator[str]:
        """The file's path, in which an error that is the drive's becomes `Away`."""
        path = self.where(index)
        try:
            yield path
        except OSError as error:
            if error.errno in UNREACHABLE or (isinstance(error, FileNotFoundError) and is_empty(self.root)):
                raise Away(f"the images are away: {path} cannot be reached ({error.strerror}){REMEDY}") from error
            raise


def size_of(path: str) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: no file can be called so
        return None


def is_empty(folder: Path) -> bool:
    """Whether a folder is missing or holds nothing, as where a drive is not mounted."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


class Folder(Files):
    """Every image file below a folder, sorted by path.

    Raises:
        UserError: the folder is missing, empty, or holds no images.
    """

    def __init__(self, root: str | Path, channels: int) -> None:
        super().__init__(root, image_names(root), channels)


class Joined:
    """Several sources, one after the other; names begin with the position of the source: 0/a.jpg, 1/a.jpg.

    A file that several sources hold counts once, with the first of them.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        places: dict[object, tuple[int, int]] = {}  # file: position of its source, index there
        for position, source in enumerate(sources):
            own = [(position, index) for index in range(len(source))]
            files = real_paths(map(source.where, range(len(source)))) if isinstance(source, Files) else own
            for file, place in zip(files, own, strict=True):
                places.setdefault(file, place)
        self._places = np.array(list(places.values()))

    @property
    def names(self) -> list[str]:
        """Position of the source, and the name there."""
        names = [source.names for source in self.sources]
        return [f"{position}/{names[position][index]}" for position, index in self._places.tolist()]

    @property
    def sizes(self) -> list[int | None]:
        """Bytes of every image, as its source says."""
        sizes = [sizes_of(source) for source in self.sources]
        return [sizes[position][index] for position, index in self._places.tolist()]

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        """What the image's source says."""
        position, own = self._places[index].tolist()
        return self.sources[position].where(own)

    def read(self, index: int) -> Picture:
        """What the image's source reads."""
        position, own = self._places[index].tolist()
        return self.sources[position].read(own)

    def cut(self, index: int, choose: Choose, size: tuple[int, int]) -> Cut:
        """What the image's source cuts."""
        position, own = self._places[index].tolist()
        return cut_of(self.sources[position], own, choose, size)


Opener = Callable[[str, int], "Source | None"]
SOURCES: list[Opener] = []
"""Asked in turn whether they open a value of --data, with so many channels (`Stored` ones are not converted to 8 bits);
None is no. Third parties may add to it. What nobody opens is a list, a pattern or a folder."""


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
        return Files(root, (file.removeprefix(os.path.join(root, "")) for file in match_images(data)), channels)
    return Folder(data, channels)


def absolute(data: str | Sequence[str]) -> str | tuple[str, ...]:
    """--data with absolute paths, for use from any folder; what is no path of an existing file stays as it is."""
    if not isinstance(data, str):
        return tuple(os.path.abspath(value) if leads_somewhere(value) else value for value in data)
    return os.path.abspath(data) if leads_somewhere(data) else data


def leads_somewhere(path: str) -> bool:
    """Whether a file or folder stands there, or matches the pattern; a local name with braces counts."""
    return os.path.exists(path) or any(iglob(path, recursive=True)) or (has_braces(path) and "://" not in path)


def is_pattern(text: str) -> bool:
    """Whether a path has a character that stands for others."""
    return any(character in text for character in "*?[")


def has_braces(text: str) -> bool:
    """Whether a name stands for several, as shard-{000..010}.tar; a file may be called so, too."""
    return "{" in text and not os.path.exists(text)
