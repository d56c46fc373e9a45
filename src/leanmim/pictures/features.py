"""Patch features as colours.

b images, c channels, H W pixels, h w patches, d width.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

from leanmim.config import Show
from leanmim.encoders.backbone import as_tokens
from leanmim.errors import UserError
from leanmim.evaluators.features import grid_of
from leanmim.pictures.figures import draw, overlay, pairs_of
from leanmim.pictures.images import drawable
from leanmim.pictures.shown import AT_ONCE, open_shown, read_shown


class Coloured(NamedTuple):
    """Features as colours, and what the colours are."""

    colours: Float[np.ndarray, "b h w 3"]
    shares: list[float]
    """Of the variance, by component."""


def coloured(maps: Float[Tensor, "b h w d"]) -> Coloured:
    """The first three principal components of all patches of all images together as red, green and blue, each stretched from its
    1st to its 99th percentile.

    Raises:
        UserError: there are too few patches.
    """
    b, h, w, d = maps.shape
    if min(b * h * w, d) < 4:
        raise UserError(f"{b} images of {h} x {w} patches are too few for three components; give more images")
    pca = PCA(3, svd_solver="full")
    found = pca.fit_transform(maps.reshape(-1, d).numpy())
    low, high = np.percentile(found, (1, 99), axis=0)
    scaled = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    return Coloured(scaled.reshape(b, h, w, 3), pca.explained_variance_ratio_.tolist())


def features(config: Show) -> Figure:
    """Each photo beside the features of its patches, as the encoder's last block or stage and its norm leave them.

    Raises:
        UserError: the encoder or the images cannot be read, or there are too few patches.
    """
    shown = open_shown(config)
    names, pictures = read_shown(config, shown)
    with torch.inference_mode():
        tokens = torch.cat(
            [
                as_tokens(shown.backbone, shown.backbone.forward_features(shown.normalise(some))).float().cpu()
                for some in pictures.split(AT_ONCE)
            ]
        )
    size = shown.start.model.size
    maps = tokens.unflatten(1, grid_of(tokens.shape[1], size))
    found = coloured(maps)
    pairs = pairs_of(names, size, ("photo", f"features, {maps.shape[1]} x {maps.shape[2]} patches"))
    for (photo, beside), original, colours in zip(pairs.axes, drawable(pictures), found.colours, strict=True):
        draw(photo, original, size)
        overlay(beside, colours, size, interpolation="nearest")
    shares = " + ".join(f"{share:.0%}" for share in found.shares)
    pairs.figure.supxlabel(
        f"{shown.caption}\nred, green, blue: the first three principal components of all {math.prod(maps.shape[:3]):,} patches "
        f"together,\n{shares} = {sum(found.shares):.0%} of the variance, each from its 1st to its 99th percentile",
        fontsize=8,
    )
    return pairs.figure
