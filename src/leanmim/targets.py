"""What the decoder has to predict: pure functions of the images, computed in float32 without gradient.

b batch, c channels, H W pixels, n patches, p target width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leanmim.errors import UserError
from leanmim.masking import Grid


@runtime_checkable
class Target(Protocol):
    """A target turns images into one vector per patch of the grid."""

    @property
    def patch(self) -> int:
        """Side of a patch, px."""
        ...

    @property
    def cell(self) -> int:
        """Side of the finest squares that have values of their own, px."""
        ...

    @property
    def width(self) -> int:
        """Values per patch, p: cell by cell, row by row."""
        ...

    def __call__(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n p"]:
        """The target of every patch."""
        ...


def patchify(images: Float[Tensor, "b c H W"], patch: int) -> Float[Tensor, "b n p"]:
    """Cut images into square patches of ``patch`` px; values are ordered row, column, channel, as in MAE."""
    b, c, height, width = images.shape
    x = images.view(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(patches: Float[Tensor, "b n p"], patch: int, grid: Grid) -> Float[Tensor, "b c H W"]:
    """The inverse of `patchify`."""
    b, _, p = patches.shape
    c = p // patch**2
    x = patches.view(b, grid.height, grid.width, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, grid.height * patch, grid.width * patch)


def patch_statistics(patches: Float[Tensor, "b n p"]) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Mean and standard deviation of each patch (MAE, section 4.1: variance with eps 1e-6)."""
    mean = patches.mean(-1, keepdim=True)
    return mean, (patches.var(-1, keepdim=True) + 1e-6).sqrt()


@dataclass(frozen=True)
class Pixels:
    """Pixels of the normalised image; with ``per_patch``, each patch by its own mean and variance (MAE)."""

    patch: int
    channels: int = 3
    per_patch: bool = True
    cell: int = 1

    @property
    def width(self) -> int:
        """Values per patch."""
        return self.patch**2 * self.channels

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n p"]:
        """The pixels of every patch."""
        patches = patchify(images.float(), self.patch)
        if self.per_patch:
            mean, std = patch_statistics(patches)
            patches = (patches - mean) / std
        return patches

    @torch.no_grad()
    def paint(self, prediction: Float[Tensor, "b n p"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """The predicted pixels; under ``per_patch`` brought back with the true patch's own mean and deviation."""
        if self.per_patch:
            mean, std = patch_statistics(patchify(images.float(), self.patch))
            prediction = prediction * std + mean
        return unpatchify(prediction, self.patch, Grid(images.shape[2] // self.patch, images.shape[3] // self.patch))


BINS = 9  # of 20 degrees
FLAT = 0.02  # a cell's norm; an edge of one grey level out of 255 makes more, rounding makes less
CHUNK = {"cpu": 2**16}  # values worked on at a time: what the caches hold
CHUNK_ELSEWHERE = 2**23


@torch.no_grad()
def hog(images: Float[Tensor, "b c H W"], cell: int = 8) -> Float[Tensor, "b k y x"]:
    """Histograms of oriented gradients, as FastMIM defines them (section 3.2).

    Per channel: 3x3 Sobel on the reflected border, unsigned orientation ``atan2(gx, gy)`` in nine bins by hard
    assignment, weighted by the magnitude, summed over cells, each cell's nine bins divided by their L2 norm.
    Cells whose norm is under ``FLAT`` are divided by that instead (ours): rounding noise stays small.

    Args:
        images: normalised images of any number of channels.
        cell: side of a cell, px. Pixels that do not fill a cell, right and below, are left out.

    Returns:
        k = 9 c values a cell, number ``channel * 9 + bin``; float32.
    """
    b, c, height, width = images.shape
    rows, columns = height // cell, width // cell
    device = images.device
    # A quarter turn both ways, -5 to 4, has places of its own at first; folding -5 to -1 onto 4 to 8 comes at the end.
    turns = BINS + 1
    down, across = (torch.arange(count * cell, device=device) // cell for count in (rows, columns))
    place = ((down[:, None] * columns + across) * turns + 5).flatten()
    planes = images.flatten(0, 1)
    chunk = max(1, CHUNK.get(device.type, CHUNK_ELSEWHERE) // (height * width))
    histogram = torch.zeros(b * c, rows * columns * turns, device=device)
    for some, out in zip(planes.split(chunk), histogram.split(chunk), strict=True):
        # Sums of float32 are exact in float64, so that no rounding decides on which side of 0 a gradient lies.
        x = nn.functional.pad(some, (1, 1, 1, 1), mode="reflect").double()
        smooth = (x[:, :-2] + x[:, 2:]).add_(x[:, 1:-1], alpha=2)
        gx = (smooth[..., 2:] - smooth[..., :-2])[:, : rows * cell, : columns * cell].flatten(1).float()
        smooth = (x[..., :-2] + x[..., 2:]).add_(x[..., 1:-1], alpha=2)
        gy = (smooth[:, 2:] - smooth[:, :-2])[:, : rows * cell, : columns * cell].flatten(1).float()
        # atan(gx / gy) is atan2(gx, gy) up to half turns, and exact where that one rounds to a half turn
        turn = (gx / gy).atan_().nan_to_num_(0).mul_(BINS / math.pi).floor_().long().add_(place)
        out.scatter_add_(1, turn, gx.square_().addcmul_(gy, gy).sqrt_())
    histogram = histogram.view(b, c, rows, columns, turns)
    bins = nn.functional.pad(histogram[..., 5:], (0, 4)) + nn.functional.pad(histogram[..., :5], (4, 0))
    return nn.functional.normalize(bins, dim=-1, eps=FLAT).permute(0, 1, 4, 2, 3).flatten(1, 2)


@dataclass(frozen=True)
class HOG:
    """Histograms of oriented gradients of the normalised image (FastMIM, section 3.2)."""

    patch: int
    channels: int = 3
    cell: int = 8

    @property
    def width(self) -> int:
        """Values per patch."""
        return (self.patch // self.cell) ** 2 * self.channels * BINS

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n p"]:
        """The histograms of every patch, cell by cell."""
        with torch.autocast(images.device.type, enabled=False):
            return patchify(hog(images.float(), self.cell), self.patch // self.cell)


def make_hog(patch: int, channels: int, cell: int) -> HOG:
    """HOG with cells that divide the patch.

    Raises:
        UserError: they do not.
    """
    if patch % cell:
        good = [size for size in range(2, patch + 1) if patch % size == 0]
        raise UserError(f"--hog-cell {cell} does not divide the model's patch of {patch} px; possible: {good}")
    return HOG(patch, channels, cell)


TARGETS: dict[str, Callable[[int, int, int], Target]] = {
    "pixels": lambda patch, channels, cell: Pixels(patch, channels),
    "raw-pixels": lambda patch, channels, cell: Pixels(patch, channels, per_patch=False),
    "hog": make_hog,
}
"""Each target from the patch's side, the channels and the side of HOG's cells. Third parties may add to it."""


def make_target(name: str, patch: int, channels: int, cell: int) -> Target:
    """The target called ``name`` in the configuration.

    Raises:
        UserError: there is none of that name, or HOG's cells do not divide the patch.
    """
    if name not in TARGETS:
        raise UserError(f"there is no --target {name!r}; there are: {', '.join(TARGETS)}")
    return TARGETS[name](patch, channels, cell)
