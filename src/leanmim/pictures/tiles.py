"""Whole images for a model that sees one size: tiles, and the image they make.

t tiles, c k channels, H W pixels of an image, h w of a tile, y x cells or pixels.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Real, Shaped
from torch import Tensor

from leanmim.data import centre_crop
from leanmim.data.read import Picture


class Tiling(NamedTuple):
    """Where the tiles of an image lie. Where two overlap, the later one is seen."""

    size: tuple[int, int]
    """Of the image: height and width, px."""
    tile: tuple[int, int]
    corners: list[tuple[int, int]]
    """Top and left of each tile, px."""

    def tiles(self, image: Real[Tensor, "c H W"]) -> Real[Tensor, "t c h w"]:
        """The tiles of an image."""
        height, width = self.tile
        return torch.stack([image[:, y : y + height, x : x + width] for y, x in self.corners])

    def whole(self, tiles: Shaped[Tensor, "t ... y x"]) -> Shaped[Tensor, "... Y X"]:
        """The image that tiles make, of pixels or of cells."""
        cell = self.tile[0] // tiles.shape[-2]
        image = tiles.new_zeros((*tiles.shape[1:-2], self.size[0] // cell, self.size[1] // cell))
        for own, (y, x) in zip(tiles, self.corners, strict=True):
            image[..., y // cell : (y + self.tile[0]) // cell, x // cell : (x + self.tile[1]) // cell] = own
        return image


def tiling(size: tuple[int, int], tile: tuple[int, int], step: int) -> Tiling:
    """As few tiles as cover an image, evenly spread. Sides are multiples of ``step``, px, and so is where tiles begin."""
    rows, columns = (evenly(own, side, step) for own, side in zip(size, tile, strict=True))
    return Tiling(size, tile, list(product(rows, columns)))


def evenly(length: int, tile: int, step: int) -> list[int]:
    """Where tiles begin along a side."""
    gaps = -(-length // tile) - 1
    return [round((length - tile) * i / max(gaps, 1) / step) * step for i in range(gaps + 1)]


def fitted(picture: Picture, tile: tuple[int, int], count: int, step: int) -> Real[Tensor, "c H W"]:
    """A whole image at the size at which ``count`` tiles cover it along one side, and at least as many along the other.

    Its sides are rounded to multiples of ``step`` px; what that leaves over is cut off.
    """
    height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
    zoom = count * max(tile[0] / height, tile[1] / width)
    size = (
        max(count * tile[0], round(zoom * height / step) * step),
        max(count * tile[1], round(zoom * width / step) * step),
    )
    return centre_crop(size, 1.0)(picture)
