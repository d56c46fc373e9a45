"""Reconstruction targets: pure functions of the images, computed in float32 without gradient.

b batch, c channels, H W pixels, n patches, p target width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leanmim.caches import cached
from leanmim.config.base import Stored
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
        """Side of the smallest square that has its own values, px: a pixel, or a cell of HOG."""
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
    """Pixels of the normalised image; with ``per_patch``, each patch is standardised by its mean and variance (MAE)."""

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
        """The predicted image; under ``per_patch`` rescaled by mean and standard deviation of the true patches."""
        if self.per_patch:
            mean, std = patch_statistics(patchify(images.float(), self.patch))
            prediction = prediction * std + mean
        return unpatchify(prediction, self.patch, Grid(images.shape[2] // self.patch, images.shape[3] // self.patch))


BINS = 9  # of 20 degrees
FLAT = 0.02  # smallest norm of a cell; an edge of one grey level in 255 exceeds it, rounding noise does not
CHUNK = {"cpu": 2**16}  # values processed at a time: they fit into the cache
CHUNK_ELSEWHERE = 2**23


@cached
def grey_levels(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Float[Tensor, "2 c 1 1"]:
    """What brings normalised images back to 0 to 255: times the first numbers, plus the second ones."""
    return 255 * torch.tensor([std, mean], dtype=torch.float64).float().to(device)[..., None, None]


@torch.no_grad()
def hog(
    images: Float[Tensor, "b c H W"], cell: int = 8, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> Float[Tensor, "b k y x"]:
    """Histograms of oriented gradients, as FastMIM defines them (section 3.2).

    Per channel: 3x3 Sobel on the reflected border, unsigned orientation ``atan2(gx, gy)`` in nine bins by hard
    assignment, weighted by the magnitude, summed over cells, each cell's nine bins divided by their L2 norm.
    Cells whose norm is below ``FLAT`` are divided by ``FLAT`` (ours), so that rounding noise stays small.

    Args:
        images: normalised images of any number of channels.
        cell: side of a cell, px. Pixels on the right and bottom border that do not fill a cell are ignored.
        mean: by which images of 8 bits were normalised, on the scale 0 to 1. Gradients are then those of their whole numbers,
            exact in float32: where two pixels are equal, normalisation has not made them differ by its rounding, and the
            orientation is not arbitrary. Empty: of other images, as they are.
        std: likewise.

    Returns:
        k = 9 c values for each cell, at index ``channel * 9 + bin``; float32.
    """
    b, c, height, width = images.shape
    rows, columns = height // cell, width // cell
    device = images.device
    # atan gives bins -5 to 4. They are counted separately; at the end -5 to -1 are added to the unsigned bins 4 to 8.
    turns = BINS + 1
    down, across = (torch.arange(count * cell, device=device) // cell for count in (rows, columns))
    place = ((down[:, None] * columns + across) * turns + 5).flatten()
    planes = images.flatten(0, 1)
    chunk = max(1, CHUNK.get(device.type, CHUNK_ELSEWHERE) // (height * width))
    histogram = torch.zeros(b * c, rows * columns * turns, device=device)
    scale, shift = (
        grey_levels(mean, std, device).repeat(1, b, 1, 1) if mean else torch.ones(2, b * c, 1, 1, device=device)
    )
    for some, out, times, plus in zip(*(x.split(chunk) for x in (planes, histogram, scale, shift)), strict=True):
        some = torch.addcmul(plus, some, times).round_() if mean else some
        x = nn.functional.pad(some, (1, 1, 1, 1), mode="reflect")
        x = x if mean else x.double()  # in which sums of float32 are exact: rounding cannot change a gradient's sign
        smooth = (x[:, :-2] + x[:, 2:]).add_(x[:, 1:-1], alpha=2)
        gx = (smooth[..., 2:] - smooth[..., :-2])[:, : rows * cell, : columns * cell].flatten(1).float()
        smooth = (x[..., :-2] + x[..., 2:]).add_(x[..., 1:-1], alpha=2)
        gy = (smooth[:, 2:] - smooth[:, :-2])[:, : rows * cell, : columns * cell].flatten(1).float()
        # atan(gx / gy) is atan2(gx, gy) modulo pi, and exact where atan2 would be rounded to pi
        turn = (gx / gy).atan_().nan_to_num_(0).mul_(BINS / math.pi).floor_().long().add_(place)
        out.scatter_add_(1, turn, gx.square_().addcmul_(gy, gy).sqrt_())
    histogram = histogram.div_(scale.flatten(1)).view(b, c, rows, columns, turns)
    bins = nn.functional.pad(histogram[..., 5:], (0, 4)) + nn.functional.pad(histogram[..., :5], (4, 0))
    return nn.functional.normalize(bins, dim=-1, eps=FLAT).permute(0, 1, 4, 2, 3).flatten(1, 2)


@dataclass(frozen=True)
class HOG:
    """Histograms of oriented gradients of the normalised image (FastMIM, section 3.2)."""

    patch: int
    channels: int = 3
    cell: int = 8
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()  # see `with_levels`

    @property
    def width(self) -> int:
        """Values per patch."""
        return (self.patch // self.cell) ** 2 * self.channels * BINS

    @torch.no_grad()
    def histograms(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k y x"]:
        """`hog` of the images."""
        with torch.autocast(images.device.type, enabled=False):
            return hog(images.float(), self.cell, self.mean, self.std)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n p"]:
        """The histograms of every patch, cell by cell."""
        return patchify(self.histograms(images), self.patch // self.cell)


def with_levels(target: Target, read_as: int, mean: Sequence[float], std: Sequence[float]) -> Target:
    """The target of images that are normalised by these: HOG of 8-bit ones then computes with their whole numbers."""
    if isinstance(target, HOG) and not isinstance(read_as, Stored):
        return replace(target, mean=tuple(mean), std=tuple(std))
    return target


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
"""Name of each target: its constructor from patch side, channels and HOG's cell side. Third parties may add to it."""


def make_target(name: str, patch: int, channels: int, cell: int) -> Target:
    """The target called ``name`` in the configuration.

    Raises:
        UserError: there is none of that name, or HOG's cells do not divide the patch.
    """
    if name not in TARGETS:
        raise UserError(f"there is no --target {name!r}; there are: {', '.join(TARGETS)}")
    return TARGETS[name](patch, channels, cell)
