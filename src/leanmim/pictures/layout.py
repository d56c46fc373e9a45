"""How the images of a figure are arranged.

b batch, k channels or values of a HOG cell, y x cells or pixels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from leanmim.names import shortened
from leanmim.pictures.figures import draw


class Column(NamedTuple):
    """A column of the figure, a batch or, where sizes differ, a list: images, or HOG with a white line round visible cells, an orange one round thrown ones."""

    title: str
    pictures: Float[Tensor, "b k y x"] | list[Tensor]
    visible: Bool[Tensor, "b y x"] | list[Tensor] | None = None
    thrown: Bool[Tensor, "b y x"] | list[Tensor] | None = None


class Panel(NamedTuple):
    """What is drawn of a run: columns, the sizes of its images (height, width in px), and notes for below the figure."""

    columns: list[Column]
    sizes: list[tuple[int, int]]
    note: str
    remarks: list[str]
    title: str = ""


def compose(panels: Sequence[Panel], names: Sequence[str]) -> Figure:
    """The figure: the columns of an image side by side, its name below the first, titles above and notes below. Above the columns
    of each of several runs stands its name.

    From four images on, where each has four columns at most, two images share a row.
    """
    columns = [(column, panel.sizes) for panel in panels for column in panel.columns]
    abreast = 2 if len(names) > 3 and len(columns) < 5 else 1
    rows = math.ceil(len(names) / abreast)
    tall = [2.0 * max(y / x for y, x in sizes) for sizes in zip(*(panel.sizes for panel in panels), strict=True)]
    heights = [max(tall[first : first + abreast]) for first in range(0, len(tall), abreast)]
    figure = Figure(
        figsize=(2.1 * len(columns) * abreast, sum(heights) + 0.8 + 0.3 * (len(panels) - 1)),
        dpi=130,
        layout="constrained",
    )
    axes = figure.subplots(rows, len(columns) * abreast, squeeze=False, height_ratios=heights)
    axes = axes.reshape(rows * abreast, len(columns))
    for row, name in enumerate(names):
        for axis, ((_, pictures, *outlined), sizes) in zip(axes[row], columns, strict=True):
            draw(axis, pictures[row], sizes[row], *(None if cells is None else cells[row] for cells in outlined))
            axis.set_anchor("N")  # where heights differ, titles and images begin at one height
        axes[row][0].set_xlabel(
            shortened(name, 30 * len(columns)), loc="left", fontsize=7, labelpad=2, parse_math=False
        )
    for axis in axes[len(names) :].flat:
        axis.set_axis_off()
    for image in axes[:abreast]:
        for axis, (column, _) in zip(image, columns, strict=True):
            axis.set_title(column.title, fontsize=10 if len(column.title) < 20 else 7)
        if len(panels) > 1:
            head_panels(list(image), panels)
    notes = [f"{panel.title}: {panel.note}" if len(panels) > 1 else panel.note for panel in panels]
    remarks = dict.fromkeys(remark for panel in panels for remark in panel.remarks)
    figure.supxlabel("\n".join([*notes, *remarks]), fontsize=8, parse_math=False)
    return figure


def head_panels(axes: Sequence[Axes], panels: Sequence[Panel]) -> None:
    """The name of each run above its columns."""
    place = 0
    for panel in panels:
        name = shortened(panel.title, 22 * len(panel.columns))
        axes[place].set_title(f"{name}\n", loc="left", fontsize=10, fontweight="bold", parse_math=False)
        place += len(panel.columns)
