"""Sources whose images lie together in large files."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import TypeVar

import numpy as np

from leanmim.data.read import Picture
from leanmim.data.strings import Strings

Self = TypeVar("Self", bound="Shards")


class Shards(ABC):
    """What such sources have in common.

    Args:
        root: how messages call the whole.
        paths: of the files.
        names: of the images.
        places: where each image is; one row each.
        channels: as for `read_image`.
    """

    def __init__(
        self, root: str | Path, paths: Sequence[str | Path], names: Iterable[str], places: np.ndarray, channels: int
    ) -> None:
        self.root, self.paths, self.channels = Path(root), [str(path) for path in paths], channels
        self._names, self.places = Strings(names), places

    @property
    def names(self) -> list[str]:
        """Of the images."""
        return list(self._names)

    def __len__(self) -> int:
        return len(self.places)

    @abstractmethod
    def where(self, index: int) -> str:
        """How a message calls an image."""

    @abstractmethod
    def read(self, index: int) -> Picture:
        """An image. Errors as for a `Source`."""

    def of(self: Self, names: Iterable[str]) -> Self:
        """Only these images, in this order."""
        at = {name: place for place, name in enumerate(self._names)}
        chosen = [at[name] for name in names]
        part = copy(self)
        part._names, part.places = Strings(self._names[place] for place in chosen), self.places[chosen]
        return part
