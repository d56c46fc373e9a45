"""The images most alike to some.

q queries, b images, k neighbours, d width.
"""

import math
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from leanmim.config import Show
from leanmim.errors import UserError
from leanmim.names import shortened
from leanmim.pictures.figures import abreast, draw, frame
from leanmim.pictures.images import drawable, spread_out
from leanmim.pictures.shown import embedded, open_shown

NEIGHBOURS = 6
LARGEST = 224  # px, of a photo
SAME, OTHER = "#1a7f37", "#c1121f"


def most_alike(
    x: Float[Tensor, "b d"], queries: Int[Tensor, " q"], k: int = NEIGHBOURS
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Cosine similarities and rows of the images most alike to each query, itself left out, the most alike first; all where there
    are fewer. Features are of unit length.
    """
    similarity = x[queries] @ x.T
    similarity[torch.arange(len(queries)), queries] = -math.inf
    return tuple(similarity.topk(min(k, len(x) - 1), dim=1))  # type: ignore[return-value]


def neighbours(config: Show) -> Figure:
    """Some photos, and the images most alike to each by the cosine of their pooled features.

    Raises:
        UserError: the encoder or the images cannot be read, or there is only one image.
    """
    shown = open_shown(config)
    places, x = embedded(config, shown, config.among)
    if len(places) < 2:
        raise UserError("neighbours need two images or more; give more with --images")
    queries = torch.tensor(sorted(islice(spread_out(len(places), config.most), config.most)))
    similarities, rows = most_alike(x, queries)
    size, names = shown.start.model.size, shown.source.names
    classes = [shown.classes[place] for place in places] if shown.classes else []
    k, digits = rows.shape[1], telling(similarities)
    width, height = 1.5 * (k + 1), 1.5 * size[0] / size[1] + (0.38 if classes else 0.25)
    across = abreast(len(queries), width, height)
    down = math.ceil(len(queries) / across)
    figure = Figure(figsize=(width * across, down * height + 0.7), dpi=130, layout="constrained")
    axes = figure.subplots(down, across * (k + 1), squeeze=False).reshape(down * across, k + 1)
    for axis in axes[len(queries) :].flat:
        axis.set_axis_off()
    for own, query, near, values in zip(axes, queries.tolist(), rows.tolist(), similarities.tolist(), strict=False):
        photos = shown.photos([places[row] for row in (query, *near)], LARGEST)
        for axis, photo in zip(own, drawable(photos), strict=True):
            draw(axis, photo, (photo.shape[1], photo.shape[2]))
        label = classes[query] if classes else Path(names[places[query]]).name
        own[0].set_title(shortened(label, 20), fontsize=7, fontweight="bold", parse_math=False)
        frame(own[0], "black")
        for axis, row, value in zip(own[1:], near, values, strict=True):
            axis.set_title(f"{value:.{digits}f}", fontsize=7)
            if classes:
                mark, colour = ("✓", SAME) if classes[row] == classes[query] else ("✗", OTHER)
                text = f"{shortened(classes[row], 20)} {mark}\n{value:.{digits}f}"
                axis.set_title(text, fontsize=7, color=colour, parse_math=False)
                frame(axis, colour, 1.5)
    note = f"{shown.caption}\nleft: the photo; then the {k} most alike of {len(places):,} images, with the cosine of the pooled features"
    figure.supxlabel(f"{note}\n{agreement(classes, queries.tolist(), rows.tolist())}".rstrip(), fontsize=8)
    return figure


def telling(similarities: Float[Tensor, "q k"]) -> int:
    """How many digits of cosines tell them apart: of an encoder that was trained little all are almost 1."""
    return min(6, max(3, 1 - math.floor(math.log10(max(1 - float(similarities.min()), 1e-6)))))


def agreement(classes: list[str], queries: list[int], rows: list[list[int]]) -> str:
    """How many neighbours are of the query's class, and how many would be by chance; nothing without classes."""
    if not classes:
        return ""
    same = sum(classes[row] == classes[query] for query, near in zip(queries, rows, strict=True) for row in near)
    total = sum(map(len, rows))
    chance = sum((classes.count(classes[query]) - 1) / (len(classes) - 1) for query in queries) / len(queries)
    return f"{same} of {total} are of the photo's class ({same / total:.0%}; by chance {chance:.0%}); a class is a folder's name"
