"""Every readable image of a source once, and why the others cannot be read.

b batch, c channels, H W pixels.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from leanmim.data.batches import CPU, loader
from leanmim.data.read import UNREADABLE, Bad
from leanmim.data.source import Source
from leanmim.errors import UserError


class Pictures(Dataset):
    """Images of a source, transformed, in the place of unreadable ones why they are. An item is (place, either of them)."""

    def __init__(self, source: Source, transform: Callable) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: int) -> tuple[int, UInt8[Tensor, "c H W"] | Bad]:
        image = read(self.source, place)
        return place, image if isinstance(image, Bad) else self.transform(image)


def read(source: Source, place: int) -> Image.Image | Bad:
    """An image, or why it cannot be read."""
    try:
        return source.read(place)
    except UNREADABLE as error:
        return Bad(source.where(place), f"{type(error).__name__}: {error}")


def nothing_readable(count: int, first: Bad) -> UserError:
    """The error of a set without any readable image."""
    return UserError(f"none of the {count} image files can be read; the first: {first.path} ({first.reason})")


def image_batches(
    source: Source,
    transform: Callable,
    batch_size: int,
    workers: int,
    report: Callable[[list[Bad]], object],
    device: torch.device = CPU,
) -> Iterator[tuple[UInt8[Tensor, "b c H W"], list[int]]]:
    """Every readable image of a source once, in its order, with its position there.

    Args:
        source: the images.
        transform: from a picture to bytes.
        batch_size: images at once, at most.
        workers: processes that read images.
        report: told of those that cannot be read, which are left out.
        device: where the batches will go.

    Raises:
        UserError: none can be read.
    """
    order = [list(range(a, min(a + batch_size, len(source)))) for a in range(0, len(source), batch_size)]
    first: Bad | None = None
    some = False
    for images, places, bad in loader(Pictures(source, transform), order, workers, device, collate_readable):
        report(bad)
        first, some = first or next(iter(bad), None), some or bool(places)
        if places:
            yield images, places
    if first and not some:
        raise nothing_readable(len(source), first)


def collate_readable(items: list[tuple[int, Tensor | Bad]]) -> tuple[Tensor | None, list[int], list[Bad]]:
    """Stack what could be read, gather its positions and the reports."""
    images = [image for _, image in items if not isinstance(image, Bad)]
    places = [place for place, image in items if not isinstance(image, Bad)]
    return torch.stack(images) if images else None, places, [image for _, image in items if isinstance(image, Bad)]
