"""Many strings in little memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

CODE = ("utf-8", "surrogatepass")  # names of files that are no text have such halves of characters


class Strings(Sequence[str]):
    """Strings that cannot be changed, one after the other in one block of bytes.

    A process that reads images shares the block with the training that forked it. Of a list it would copy every string that it
    touches, since Python counts references within them.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode(*CODE) for text in texts]
        self.block = b"".join(encoded)
        self.bounds = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self.block[self.bounds[place] : self.bounds[place + 1]].decode(*CODE)

    def __iter__(self) -> Iterator[str]:
        return (self.block[start:stop].decode(*CODE) for start, stop in pairwise(self.bounds.tolist()))
