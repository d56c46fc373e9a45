"""Every readable image of a source once, and why the others cannot be read.

b batch, c channels, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Real
from torch import Tensor
from torch.utils.data import Dataset

from leanmim.data.batches import CPU, loader, say_once
from leanmim.data.read import Bad
from leanmim.data.shards import Shards
from leanmim.data.source import Files, Source, nothing_readable, read


class Pictures(Dataset):
    """Images of a source, transformed, in the place of unreadable ones why they are. An item is (place, either of them).

    It is asked for by its place, or by (seed, place), which fixes the transform's random choices.
    """

    def __init__(self, source: Source, transform: Callable) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[int, Real[Tensor, "c H W"] | Bad]:
        seed, place = (0, item) if isinstance(item, int) else item
        image = read(self.source, place)
        if isinstance(image, Bad):
            return place, image
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return place, self.transform(image)


def image_batches(
    source: Source,
    transform: Callable,
    batch_size: int,
    workers: int,
    report: Callable[[list[Bad]], object],
    device: torch.device = CPU,
    patience: float = 0.0,
) -> Iterator[tuple[Real[Tensor, "b c H W"], list[int]]]:
    """Every readable image of a source once, in its order, with its position there.

    Args:
        source: the images.
        transform: from a picture to bytes, or to stored values.
        batch_size: images at once, at most.
        workers: processes that read images.
        report: told of those that cannot be read, which are left out.
        device: where the batches will go.
        patience: minutes to wait for images that are away.

    Raises:
        UserError: none can be read.
    """
    order = [list(range(a, min(a + batch_size, len(source)))) for a in range(0, len(source), batch_size)]
    first: Bad | None = None
    some = False
    feed = loader(Pictures(source, transform), order, workers, device, collate_readable, patience)
    for images, places, bad in feed:
        report(bad)
        first, some = first or next(iter(bad), None), some or bool(places)
        if places:
            yield images, places
    if first and not some:
        raise nothing_readable(len(source), first)


def tell_left_out(source: Files | Shards, kept: Sequence[int]) -> None:
    """Say on the standard error, once, which images of a set could not be read."""
    if lost := sorted(set(range(len(source))) - set(kept)):
        names = ", ".join(map(source.where, lost[:3])) + (", ..." if len(lost) > 3 else "")
        say_once(
            f"leanmim: {len(lost)} of {len(source)} images of {source.root} cannot be read and are left out: {names}"
        )


def collate_readable(items: list[tuple[int, Tensor | Bad]]) -> tuple[Tensor | None, list[int], list[Bad]]:
    """Stack what could be read, gather its positions and the reports."""
    images = [image for _, image in items if not isinstance(image, Bad)]
    places = [place for place, image in items if not isinstance(image, Bad)]
    return torch.stack(images) if images else None, places, [image for _, image in items if isinstance(image, Bad)]
