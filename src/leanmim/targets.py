"""What the decoder has to predict: pure functions of the images, computed in float32 without gradient.

b batch, c channels, H W pixels, n patches, p target width.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from leanmim.masking import Grid


@runtime_checkable
class Target(Protocol):
    """A target turns images into one vector per patch of the grid."""

    @property
    def width(self) -> int:
        """Values per patch, p."""
        ...

    def __call__(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n p"]:
        """The target of every patch."""
        ...

    def paint(self, prediction: Float[Tensor, "b n p"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """The prediction as an image, for people to look at."""
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
