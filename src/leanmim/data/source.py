"""Where images come from. To everybody else a source has a length, names, and `read(index)`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from leanmim.data.read import read_image
from leanmim.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


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
            UNREADABLE: it cannot be read.
        """
        ...

    def where(self, index: int) -> str:
        """How a message calls the image: a path, for example."""
        ...


class Folder:
    """Every image file below a folder, sorted by path.

    Raises:
        UserError: the folder is missing, empty, or holds no images.
    """

    def __init__(self, root: str | Path, channels: int) -> None:
        self.root, self.channels = Path(root), channels
        # one string, not a million Python objects: forked workers then share it instead of copying it
        self._names = np.array([os.fspath(file.relative_to(self.root)) for file in list_images(root)])

    @property
    def names(self) -> list[str]:
        """Paths below the folder."""
        return self._names.tolist()

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, self._names[index])

    def read(self, index: int) -> Image.Image:
        """The file as a picture."""
        return read_image(self.where(index), self.channels)


Opener = Callable[[str, int], "Source | None"]
SOURCES: list[Opener] = []
"""Asked in turn whether they open what --data names, with so many channels; None is no. Third parties may add to it. What
nobody opens is a folder."""


def open_source(data: str, channels: int) -> Source:
    """The source that --data names.

    Raises:
        UserError: there is none, or it holds no images.
    """
    found = (opener(data, channels) for opener in SOURCES)
    return next((source for source in found if source is not None), None) or Folder(data, channels)


def list_images(folder: str | Path) -> list[Path]:
    """Every image file below a folder, sorted, hidden files left out.

    Raises:
        UserError: the folder is missing, empty, or holds no images.
    """
    root = Path(folder)
    if not root.exists():
        raise UserError(f"there is no folder {str(root)!r}; --data takes a folder of images")
    if not root.is_dir():
        raise UserError(f"{str(root)!r} is a file; --data takes a folder of images")
    files: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            files += [Path(here, name) for name in names if not name.startswith(".")]
        seen.add(real)
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES)
    if not images:
        what = f"{len(files)} files but no images" if files else "no files"
        raise UserError(f"{str(root)!r} holds {what}; leanmim reads {', '.join(sorted(s[1:] for s in SUFFIXES))}")
    return images
