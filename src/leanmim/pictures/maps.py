"""All images in two dimensions, by likeness.

b images, d width.
"""

import math
from collections import Counter
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from leanmim.config import Show
from leanmim.errors import UserError
from leanmim.names import shortened
from leanmim.pictures.images import drawable
from leanmim.pictures.shown import embedded, open_shown

LEAST = 5  # images
COMPONENTS = 50  # of the features, before t-SNE
SIDE, DPI = 11.0, 130  # inches, and px of an inch: of the figure
LARGEST = 130  # px, of a photo
COVERED = 0.45  # share of the figure that photos would cover if they did not overlap
COLOURED = 20  # classes that have a colour of their own
OTHERS = "#b0b0b0"


def arranged(x: Float[Tensor, "b d"], seed: int) -> Float[np.ndarray, "b 2"]:
    """By t-SNE of the first 50 principal components; from five images on."""
    reduced = PCA(min(COMPONENTS, *x.shape), random_state=seed).fit_transform(x.numpy())
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)


def embedding_map(config: Show) -> Figure:
    """Photos where t-SNE puts their pooled features, framed in the colour of their class.

    Raises:
        UserError: the encoder or the images cannot be read, or there are too few.
    """
    shown = open_shown(config)
    places, x = embedded(config, shown, config.most)
    if len(places) < LEAST:
        raise UserError(f"a map needs {LEAST} images or more, and there are {len(places)}; give more with --images")
    points = arranged(x, config.seed)
    side = min(LARGEST, SIDE * DPI * math.sqrt(COVERED / len(places)))
    photos = drawable(shown.photos(places, round(side)))
    if photos.shape[1] == 1:
        photos = photos.expand(-1, 3, -1, -1)
    colours, legend = class_colours([shown.classes[place] for place in places] if shown.classes else [])
    figure = Figure(figsize=(SIDE, SIDE + 0.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color("#d0d0d0")
    axis.set_xlim(*limits(points[:, 0]))
    axis.set_ylim(*limits(points[:, 1]))
    for i, (point, photo) in enumerate(zip(points, photos.permute(0, 2, 3, 1).clamp(0, 1).numpy(), strict=True)):
        edge = {"edgecolor": colours[i], "linewidth": 1.8} if colours else {"linewidth": 0}
        image = OffsetImage(photo, zoom=side / max(photo.shape[:2]) * 72 / DPI)  # it counts in points
        axis.add_artist(AnnotationBbox(image, tuple(point), pad=0.0, bboxprops=edge))
    if legend:
        handles = [Patch(color=colour, label=name) for name, colour in legend.items()]
        keys = figure.legend(
            handles=handles, loc="outside upper center", ncols=min(5, len(handles)), frameon=False, fontsize=9
        )
        for text in keys.get_texts():
            text.set_parse_math(False)
    of = f"{len(places):,}" + (f" of {len(shown.source):,}" if len(places) < len(shown.source) else "")
    figure.supxlabel(
        f"{shown.caption}\n{of} images; t-SNE (seed {config.seed}) of the pooled features, of unit length: neighbours are alike, "
        "distances between groups say little",
        fontsize=9,
    )
    return figure


def limits(values: Float[np.ndarray, " b"]) -> tuple[float, float]:
    """Of an axis, with room for half a photo at the ends."""
    margin = 0.05 * float(np.ptp(values)) or 1.0
    return float(values.min()) - margin, float(values.max()) + margin


def class_colours(classes: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """The colour of each image, and the legend: the classes of most images have one of their own, the others are grey. Both are
    empty without classes.
    """
    names = [name for name, _ in Counter(classes).most_common(COLOURED)]
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    own = dict(zip(sorted(names), palette, strict=False))
    legend: dict[str, Any] = {shortened(name, 30): colour for name, colour in own.items()}
    if rest := len(set(classes)) - len(own):
        legend[f"{rest} other classes"] = OTHERS
    return [own.get(name, OTHERS) for name in classes], legend
