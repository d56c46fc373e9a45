"""Which images are drawn, and how stored values are.

b batch, c channels, H W pixels, k channels drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor

from leanmim.config import Pretrain, Show
from leanmim.data import UNREADABLE, Files, Source, list_images, open_source
from leanmim.data.read import Picture
from leanmim.errors import UserError


def read_with(
    transform: Callable[[Picture], Tensor], config: Show, trained: Pretrain
) -> tuple[list[str], list[Tensor]]:
    """The names of the images to draw, at most ``config.most``, and the images, c H W of any sizes.

    Of the run's own data and of folders, images that cannot be read are replaced by others.

    Raises:
        UserError: a file or folder is missing, a folder holds no images, or a file given by name or all images cannot be
            read.
    """
    source = open_images(config.images, trained)
    found = read_some(source, config.most, transform, config.images)
    if not found:
        raise UserError(f"no image of {config.images or trained.data!r} can be read; give others with --images")
    names = source.names
    return [Path(names[i]).name for i in found], list(found.values())


def read_some(
    source: Source, count: int, transform: Callable[[Picture], Tensor], needed: Sequence[str] = ()
) -> dict[int, Tensor]:
    """So many images of a source, evenly spread, by their numbers; others in place of those that cannot be read.

    Raises:
        UserError: a file that is ``needed`` cannot be read.
    """
    found: dict[int, Tensor] = {}
    for i in spread_out(len(source), count):
        if len(found) == count:
            break
        try:
            found[i] = transform(source.read(i))
        except UNREADABLE as error:
            if Path(source.where(i)) in map(Path, needed):
                raise UserError(f"--images {source.where(i)!r} cannot be read as an image: {error}") from error
    return found


def open_images(images: Sequence[str], trained: Pretrain) -> Source:
    """The files given and those in the folders given; the run's own data where none are given.

    Raises:
        UserError: a file or folder is missing, or a folder holds no images.
    """
    if not images:
        try:
            return open_source(trained.data, trained.read_as)
        except UserError as error:
            raise UserError(
                f"the run's own data {trained.data!r}: {error}; give images with --images instead"
            ) from error
    return given_images(images, trained.read_as)


def given_images(images: Sequence[str], channels: int) -> Files:
    """The files given and those in the folders given. Errors as for `open_images`."""
    paths: list[Path] = []
    for image in images:
        path = Path(image)
        if not path.exists():
            raise UserError(f"--images {image!r}: there is no such file or folder")
        paths += list_images(path) if path.is_dir() else [path]
    return Files("", paths, channels)


def spread_out(total: int, count: int) -> Iterator[int]:
    """The numbers below ``total``, beginning with ``count`` evenly spread ones."""
    step = max(1, total // count)
    return (i for start in range(step) for i in range(start, total, step))


def stretched(
    originals: Float[Tensor, "b c H W"], together: Sequence[int] = ()
) -> Callable[[Float[Tensor, "b c H W"]], Float[Tensor, "b k H W"]]:
    """How images of stored values are drawn, and others in the same way: the first three channels as red, green and blue, of
    one or two the first in grey, each stretched from the 1st to the 99th percentile of the original.

    Args:
        originals: the images.
        together: how many that follow each other are tiles of one original; none given are one each.
    """
    k = 3 if originals.shape[1] > 2 else 1
    counts = list(together) or [1] * len(originals)
    values = [part.transpose(0, 1).flatten(1).cpu().numpy() for part in originals[:, :k].split(counts)]
    found = np.repeat([np.percentile(own, (1, 99), axis=1) for own in values], counts, axis=0)  # b 2 k
    low, high = torch.from_numpy(found)[..., None, None].float().to(originals.device).unbind(1)
    return lambda images: ((images[:, :k] - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def drawable(pictures: Real[Tensor, "b c H W"]) -> Float[Tensor, "b k H W"]:
    """Images from 0 to 1: bytes, or stored values as `stretched` draws them."""
    return pictures / 255 if pictures.dtype == torch.uint8 else stretched(pictures)(pictures)
