"""Figures: images and HOG on axes, and a file of them.

k channels or values of a HOG cell, y x cells or pixels.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from leanmim.files import write_atomically
from leanmim.names import shortened
from leanmim.targets import BINS

ORANGE = torch.tensor([0.95, 0.6, 0.2])  # round thrown cells


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically; characters that the font has not are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


def draw(
    axis: Axes,
    picture: Float[Tensor, "k y x"],
    size: tuple[int, int],
    visible: Bool[Tensor, "y x"] | None = None,
    thrown: Bool[Tensor, "y x"] | None = None,
) -> None:
    """An image, or HOG as strokes on black with lines round cells, on an axis of the image's ``size`` (height, width in px)."""
    bare(axis)
    if picture.shape[1:] == size:
        pixels = picture.permute(1, 2, 0).squeeze(-1).numpy()
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
    else:
        cell = size[0] // picture.shape[1]
        axis.imshow(torch.zeros(size).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.add_collection(strokes(picture, cell), autolim=False)
        for cells, colour in ((visible, "white"), (thrown, ORANGE.tolist())):
            if cells is not None:
                axis.add_collection(outline(cells, cell, colour), autolim=False)


def bare(axis: Axes) -> None:
    """An axis without ticks and lines."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def overlay(axis: Axes, values: Any, size: tuple[int, int], **options: Any) -> None:
    """Values of patches over an image of a ``size`` (height, width in px); ``options`` are those of `imshow`."""
    bare(axis)
    axis.imshow(values, extent=(-0.5, size[1] - 0.5, size[0] - 0.5, -0.5), **options)


class Pairs(NamedTuple):
    """A figure of photos, each with something beside it."""

    figure: Figure
    axes: list[tuple[Axes, Axes]]


def pairs_of(names: Sequence[str], size: tuple[int, int], titles: tuple[str, str]) -> Pairs:
    """A pair of axes for each name, which stands below the first; titles above the first row. Images have a ``size`` (height,
    width in px).
    """
    width, height = 4.2, 2.1 * size[0] / size[1] + 0.12
    across = abreast(len(names), width, height)
    rows = math.ceil(len(names) / across)
    figure = Figure(figsize=(width * across, rows * height + 0.8), dpi=130, layout="constrained")
    axes = figure.subplots(rows, 2 * across, squeeze=False).reshape(rows * across, 2)
    for (photo, _), name in zip(axes, names, strict=False):
        photo.set_xlabel(shortened(name, 34), loc="left", fontsize=7, labelpad=2, parse_math=False)
    for pair in axes[:across]:
        for axis, title in zip(pair, titles, strict=True):
            axis.set_title(title, fontsize=9)
    for axis in axes[len(names) :].flat:
        axis.set_axis_off()
    return Pairs(figure, [(photo, beside) for photo, beside in axes[: len(names)]])


def frame(axis: Axes, colour: Any, width: float = 2.0) -> None:
    """A frame round an axis that `draw` has drawn on, ``width`` points wide."""
    axis.spines[:].set(visible=True, color=colour, linewidth=width)


def abreast(count: int, width: float, height: float, tallest: float = 1.7) -> int:
    """How many of ``count`` panels of a width and height share a row, so that the figure is not taller than so many times its
    width.
    """
    return next(n for n in range(1, count + 1) if n == count or math.ceil(count / n) * height <= tallest * n * width)


def outline(cells: Bool[Tensor, "y x"], cell: int, colour: Any) -> LineCollection:
    """Lines round groups of cells, of ``cell`` px each."""
    cells, lines = pad(cells, (1, 1, 1, 1)), []
    for flip, own in ((False, cells), (True, cells.T)):
        for row, column in (own[1:] ^ own[:-1]).nonzero().tolist():
            y, x = row * cell - 0.5, (column - 1) * cell - 0.5  # before the first row of cells is a row of padding
            lines.append([(y, x), (y, x + cell)] if flip else [(x, y), (x + cell, y)])
    return LineCollection(lines, colors=[colour], linewidths=0.8)


def strokes(histogram: Float[Tensor, "k y x"], cell: int) -> LineCollection:
    """HOG as it is usually drawn: in each cell a stroke along every edge direction, the brighter the stronger; its hue is that of
    the direction, without which a small picture is only texture.

    The gradient of bin ``i`` points along ``(sin t, cos t)`` with ``t`` the bin's middle; its edge stands across.
    """
    bins = histogram.unflatten(0, (-1, BINS)).mean(0).clamp(min=0)  # over the channels
    bins = bins / bins.max().clamp(min=1e-6)
    angle = (torch.arange(BINS) + 0.5) * (math.pi / BINS)
    along = torch.stack([angle.cos(), -angle.sin()], dim=1) * (0.48 * cell)
    _, rows, columns = bins.shape
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centre = (torch.stack([x, y], dim=-1) + 0.5) * cell - 0.5
    ends = torch.stack([centre - along[:, None, None], centre + along[:, None, None]], dim=-2)  # bins y x 2 2
    strength = bins.flatten()
    order = strength.argsort()  # the strongest on top
    hues = torch.from_numpy(hsv_to_rgb([(i / BINS, 0.6, 1.0) for i in range(BINS)])).float()
    colours = torch.cat(
        [hues[:, None].expand(-1, rows * columns, -1).reshape(-1, 3)[order], strength[order, None]], dim=1
    )
    return LineCollection(list(ends.flatten(0, 2)[order].numpy()), colors=colours.numpy(), linewidths=0.8)
