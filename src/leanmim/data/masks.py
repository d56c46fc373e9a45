"""Images with a mask for each, whose values are the classes of its pixels.

H W pixels, h w patches.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Integer, Real, Shaped
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from leanmim.data.crops import centre_box, centre_crop, kept_share
from leanmim.data.labelled import Labelled
from leanmim.data.read import Bad, bounded, opened
from leanmim.data.source import Files, Folder, read
from leanmim.errors import UserError

PARTS, KINDS = ("train", "val"), ("images", "masks")
LAYOUT = (
    "it holds train/images, train/masks, val/images and val/masks (or images/train and so on), and for each image NAME.jpg (or of "
    "another kind) a mask NAME.png"
)
SPREAD = {"L;2": 85, "L;4": 17}
"""Grey PNG files of 2 and 4 bits, as Pillow calls them: it spreads their values over 0 to 255, by these factors."""


class Pair(NamedTuple):
    """An image, cut and resized, and the same part of its mask, cut but not resized."""

    image: Real[Tensor, "c H W"]
    mask: Integer[np.ndarray, "y x"]


class Masks(Files):
    """PNG files whose values are classes."""

    def read(self, index: int) -> Shaped[np.ndarray, "H W *c"]:
        """The values of a file as they are stored, of a palette its indices. Errors as for `Files.read`."""
        with (
            self.reached(index) as path, bounded(path), opened(path) as file, Image.open(file, formats=["PNG"]) as stored,
        ):  # fmt: skip
            factor = SPREAD.get(str(stored.tile[0][3]), 1)
            return np.array(stored) // factor


class Masked(Labelled):
    """Images with a mask for each in the place of a label, cut as `centre_crop` does.

    Args:
        images: folder of the images.
        masks: folder of the masks; the mask of an image has its path below the folder, but for the suffix.
        channels: of the images.
        size: of the images once cut, height and width, px.
        crop: see `centre_crop`.

    Raises:
        UserError: images or masks lack their counterpart, or masks are no PNG files.
    """

    def __init__(
        self, images: Path, masks: Path, channels: int, size: tuple[int, int], crop: float | None = None
    ) -> None:
        self.source: Folder = Folder(images, channels)
        self.size, self.crop, self.transform = size, kept_share(size, crop), centre_crop(size, crop)
        self.labels, self.classes = [], []  # an image has none of its own
        found = Folder(masks, 1)
        if others := [name for name in found.names if not name.lower().endswith(".png")]:
            raise UserError(
                f"masks are PNG files, grey or with a palette, whose values are classes; {found.root} holds {shown(others)}"
            )
        own, theirs = by_stem(self.source), by_stem(found)
        for what, root, lacking, other in (("image", images, own, theirs), ("mask", masks, theirs, own)):
            if alone := [name for stem, name in lacking.items() if stem not in other]:
                raise UserError(
                    f"{len(alone)} of {len(lacking)} {what}s in {root} have no {'mask' if what == 'image' else 'image'} of "
                    f"the same name: {shown(alone)}; add it, or move them away"
                )
        self.masks = Masks(found.root, [theirs[stem] for stem in own], 1)

    @property
    def pairs(self) -> "Pairs":
        """Images and masks; in the place of unreadable ones why they are."""
        return Pairs(self)


class Pairs(Dataset):
    """Images and masks of a set. An item is (place, a pair, or why it cannot be read).

    Raises:
        UserError: a mask has colours, or another size than its image.
    """

    def __init__(self, data: Masked) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> tuple[int, Pair | Bad]:
        data = self.data
        image, mask = read(data.source, place), read(data.masks, place)
        if isinstance(image, Bad):
            return place, image
        if isinstance(mask, Bad):
            return place, mask
        values = np.asarray(mask)
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        where = data.masks.where(place)
        if values.ndim != 2:
            raise UserError(
                f"{where} is a picture in colours; a mask has one value for each pixel, its class: write it as a grey PNG or "
                "one with a palette, with a number for each colour"
            )
        if values.shape != (height, width):
            raise UserError(
                f"{where} has {values.shape[1]} x {values.shape[0]} pixels, its image {data.source.where(place)} {width} x "
                f"{height}; give the mask the size of the image, without interpolating between classes"
            )
        left, top, right, bottom = centre_box(height, width, data.size, data.crop)
        return place, Pair(data.transform(image), values[top:bottom, left:right].astype(np.int64))


def by_stem(files: Files) -> dict[str, str]:
    """The names of files by themselves without suffix.

    Raises:
        UserError: two are the same without it.
    """
    found: dict[str, str] = {}
    for name in files.names:
        if (other := found.setdefault(os.path.splitext(name)[0], name)) != name:
            raise UserError(
                f"{files.root} holds {other} and {name}: images and masks belong together by their names without suffix; "
                "rename or remove one"
            )
    return found


def shown(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def masked_pair(
    folder: str | Path, channels: int, size: tuple[int, int], crop: float | None = None
) -> tuple[Masked, Masked]:
    """The sets train and val of a folder of images with masks; arguments as for `Masked`.

    Raises:
        UserError: the folder is laid out otherwise.
    """
    root = Path(folder)
    outer, form = (KINDS, "{1}/{0}") if (root / "images" / "train").is_dir() else (PARTS, "{0}/{1}")
    places = {(part, kind): root / form.format(part, kind) for part in PARTS for kind in KINDS}
    for place in (root, *(root / name for name in outer), *places.values()):
        if not place.is_dir():
            raise UserError(f"--masks {str(folder)!r}: there is no folder {str(place)!r}; {LAYOUT}")
    train, val = (Masked(places[part, "images"], places[part, "masks"], channels, size, crop) for part in PARTS)
    return train, val


def collate_pairs(
    items: list[tuple[int, Pair | Bad]],
) -> tuple[Tensor | None, list[np.ndarray], list[int], list[Bad]]:
    """Stack the images that could be read, gather their masks, which differ in size, their places and the reports."""
    pairs = [(place, pair) for place, pair in items if not isinstance(pair, Bad)]
    images = torch.stack([pair.image for _, pair in pairs]) if pairs else None
    return (
        images,
        [pair.mask for _, pair in pairs],
        [place for place, _ in pairs],
        [pair for _, pair in items if isinstance(pair, Bad)],
    )


def patch_classes(
    mask: Integer[np.ndarray, "H W"], grid: tuple[int, int], void: Sequence[int]
) -> Integer[np.ndarray, "h w"]:
    """The class of most pixels of each patch that are not void, the lowest of several; -1 where there is none.

    Args:
        mask: classes.
        grid: patches down and across.
        void: values that are no class.
    """
    down, across = (np.arange(side) * count // side for side, count in zip(mask.shape, grid, strict=True))
    patches = down[:, None] * grid[1] + across
    values, which = np.unique(mask, return_inverse=True)
    n = grid[0] * grid[1]
    counts = np.bincount(which.ravel() * n + patches.ravel(), minlength=len(values) * n).reshape(len(values), n)
    counts[np.isin(values, void)] = 0
    return np.where(counts.any(0), values[counts.argmax(0)], -1).reshape(grid)
