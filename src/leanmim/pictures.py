"""Pictures: original, masked image, reconstruction.

b batch, c channels, H W pixels, n patches, p target width, k values of a HOG cell, y x cells.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from leanmim.config import Pretrain, Show
from leanmim.config.base import Stored
from leanmim.data import UNREADABLE, Files, Normalise, Source, centre_crop, list_images, open_source
from leanmim.errors import CannotWrite, UserError
from leanmim.files import write_atomically
from leanmim.masking import Mask, Split, hidden_squares, magnify, squares
from leanmim.mim import MIM
from leanmim.names import shortened
from leanmim.targets import BINS, FLAT, HOG, Pixels, hog, unpatchify
from leanmim.weights import restore

ORANGE = torch.tensor([0.95, 0.6, 0.2])  # round thrown cells
BROWN = torch.tensor(
    [0.66, 0.53, 0.39]
)  # of thrown patches: as bright as the grey of masked ones, so that the photo stands out


class Column(NamedTuple):
    """A column of the figure: images, or HOG with a white line round visible cells, an orange one round thrown ones."""

    title: str
    pictures: Float[Tensor, "b k y x"]
    visible: Bool[Tensor, "b y x"] | None = None
    thrown: Bool[Tensor, "b y x"] | None = None


def show(config: Show) -> Path:
    """Draw rows of original, masked image and reconstruction.

    Of a run in segments (BIM) a column for each, unless one is asked for. Where patches are thrown (PR-MIM), they are brown in the
    masked image, and a further column shows them alone, as they were filled in. Predictions of per-patch normalised pixels are brought back with the true patch's own mean and
    deviation, and the picture says so. A target that is neither pixels nor HOG has no reconstruction. Stored values are drawn
    as `stretched` says.

    Returns:
        The picture.

    Raises:
        UserError: the run or the images cannot be read, there is no such segment, or the picture cannot be written.
    """
    config.check()
    trained, model, state = restore(config.run)
    names, pictures = read_images(config, trained)
    normalise = Normalise(state["mean"], state["std"], torch.device("cpu"))
    images = normalise(pictures)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        masks = model.eval().draw_masks(images)
        splits = [model.draw_split(mask) for mask in masks]
    count = len(masks)
    if config.segment is not None and not 0 <= config.segment < count:
        raise UserError(f"--segment {config.segment}: this run has {count} segments, 0 to {count - 1}")
    segments = range(count) if config.segment is None else [config.segment]
    columns, remarks = make_columns(trained, model, normalise, images, masks, splits, segments)
    note = f"{trained.recipe}, {trained.model}, step {state['step']}"
    if count > 1:
        note += f", {count} segments" if config.segment is None else f", segment {config.segment} of 0 to {count - 1}"
    figure = compose(columns, names, trained, "\n".join([note, *remarks]))
    default = "reconstructions.png" if config.segment is None else f"reconstructions-segment{config.segment}.png"
    path = Path(config.out) if config.out else Path(config.run) / default
    try:
        save_figure(figure, path)
    except CannotWrite as error:
        raise CannotWrite(f"{error}, or give the name of another picture with --out") from error
    return path


def read_images(config: Show, trained: Pretrain) -> tuple[list[str], Real[Tensor, "b c H W"]]:
    """The names of the images to draw, at most ``config.count``, and their centre crops.

    Of the run's own data and of folders, images that cannot be read are replaced by others.

    Raises:
        UserError: a file or folder is missing, a folder holds no images, or a file given by name or all images cannot be
            read.
    """
    source = open_images(config.images, trained)
    transform, names = centre_crop(trained.size), source.names
    found: dict[int, Tensor] = {}
    for i in spread_out(len(source), config.count):
        if len(found) == config.count:
            break
        try:
            found[i] = transform(source.read(i))
        except UNREADABLE as error:
            if Path(source.where(i)) in map(Path, config.images):
                raise UserError(f"--images {source.where(i)!r} cannot be read as an image: {error}") from error
    if not found:
        raise UserError(f"no image of {config.images or trained.data!r} can be read; give others with --images")
    return [Path(names[i]).name for i in found], torch.stack(list(found.values()))


def open_images(images: Sequence[str], trained: Pretrain) -> Source:
    """The files given and those in the folders given; the run's own data where none are given.

    Raises:
        UserError: a file or folder is missing, or a folder holds no images.
    """
    if not images:
        try:
            return open_source(trained.data, trained.read_as)
        except UserError as error:
            raise UserError(
                f"the run's own data {trained.data!r}: {error}; give images with --images instead"
            ) from error
    paths: list[Path] = []
    for image in images:
        path = Path(image)
        if not path.exists():
            raise UserError(f"--images {image!r}: there is no such file or folder")
        paths += list_images(path) if path.is_dir() else [path]
    return Files("", paths, trained.read_as)


def spread_out(total: int, count: int) -> list[int]:
    """The numbers below ``total``, beginning with ``count`` evenly spread ones."""
    step = max(1, total // count)
    return [i for start in range(step) for i in range(start, total, step)]


def make_columns(
    trained: Pretrain,
    model: MIM,
    normalise: Normalise,
    images: Float[Tensor, "b c H W"],
    masks: list[Mask],
    splits: list[Split],
    segments: Sequence[int],
) -> tuple[list[Column], list[str]]:
    """The columns of the figure and the remarks below it, for some segments; masks and splits are those of all. The masked image is
    that of the last one.
    """
    stored, throws = isinstance(trained.read_as, Stored), bool(splits[0].thrown.numel())
    seen = stretched(images) if stored else normalise.invert
    original, remarks = seen(images), []
    hidden = [hidden_pixels(model, images, mask) for mask in masks]
    thrown = [
        own & magnify(squares(s.thrown, model.encoder.grid), trained.size)
        for own, s in zip(hidden, splits, strict=True)
    ]
    last = segments[-1]
    masked, title = torch.where(hidden[last][:, None], 0.5, original), f"masked, {hidden[last].float().mean():.0%}"
    if throws:
        masked, title = in_brown(masked, thrown[last]), f"{title}, thrown {thrown[last].float().mean():.0%} (brown)"
    columns = [Column("original", original), Column(title, masked)]
    names = {i: f", segment {i} ({hidden[i].float().mean():.0%})" if len(segments) > 1 else "" for i in segments}
    if stored:
        which = f"{'channels 1 to 3' if trained.channels > 2 else 'channel 1'} of {trained.channels}"
        remarks.append(f"{which}, stretched from the 1st to the 99th percentile of each image")
    if isinstance(model.target, HOG):
        true = hog(images, model.target.cell)
        columns.append(Column("HOG", true))
        middle = slice(model.target.cell // 2, None, model.target.cell)  # stands for its cell
        for i, name in names.items():
            own, cells = ~hidden[i][:, middle, middle], thrown[i][:, middle, middle] if throws else None
            columns.append(Column(f"HOG, predicted{name}", histograms(model, images, masks, splits, i)[1], own, cells))
        flat = (true.unflatten(1, (-1, BINS)).norm(dim=2) < 0.999).float().mean()
        remark = f"colour: direction of the edge; inside white lines: visible cells, the true ones; flat cells (norm under {FLAT}): {flat:.1%}"
        if throws:
            remark += f"; inside orange lines: thrown, {'filled in' if trained.fill else 'empty'}"
        remarks.append(remark)
    elif isinstance(model.target, Pixels):
        star = " *" if model.target.per_patch else ""
        for i, name in names.items():
            painted = seen(reconstruct(model, images, masks, splits, i)[0])
            columns.append(
                Column(
                    f"reconstruction{star}{name}",
                    in_brown(painted, thrown[i]) if throws and not trained.fill else painted,
                )
            )
        if throws and trained.fill:
            columns.append(Column("filled in only", torch.where(thrown[last][:, None], painted, 1.0)))
        if star:
            remarks.append("* predicted patches brought back with the true patch's own mean and deviation")
    else:
        remarks.append(f"--target {trained.target} has no reconstruction that can be drawn")
    return columns, remarks


def stretched(originals: Float[Tensor, "b c H W"]) -> Callable[[Float[Tensor, "b c H W"]], Float[Tensor, "b k H W"]]:
    """How images of stored values are drawn, and others in the same way: the first three channels as red, green and blue, of
    one or two the first in grey, each stretched from the 1st to the 99th percentile of the original.
    """
    k = 3 if originals.shape[1] > 2 else 1
    values = originals[:, :k].flatten(2).numpy()
    low, high = (torch.from_numpy(np.percentile(values, share, axis=2))[..., None, None].float() for share in (1, 99))
    return lambda images: ((images[:, :k] - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


@torch.no_grad()
def predict(
    model: MIM,
    images: Float[Tensor, "b c H W"],
    masks: list[Mask],
    splits: list[Split] | None = None,
    segment: int = -1,
) -> Float[Tensor, "b n p"]:
    """A segment's predictions of the masked patches, zero for the others."""
    ids, prediction = list(model.predictions(images, masks, splits))[segment]
    canvas = torch.zeros(len(images), model.encoder.grid.n, prediction.shape[2], device=images.device)
    return canvas.scatter(1, ids[..., None].expand_as(prediction), prediction)


@torch.no_grad()
def reconstruct(
    model: MIM,
    images: Float[Tensor, "b c H W"],
    masks: list[Mask],
    splits: list[Split] | None = None,
    segment: int = -1,
) -> tuple[Float[Tensor, "b c H W"], Bool[Tensor, "b H W"]]:
    """Images with a segment's predictions in place of its masked patches. The target is pixels.

    Returns:
        The reconstruction, and whether each pixel was masked.
    """
    assert isinstance(model.target, Pixels)
    painted = model.target.paint(predict(model, images, masks, splits, segment), images)
    hidden = hidden_pixels(model, images, masks[segment])
    return torch.where(hidden[:, None], painted, images), hidden


def histograms(
    model: MIM, images: Float[Tensor, "b c H W"], masks: list[Mask], splits: list[Split], segment: int
) -> tuple[Float[Tensor, "b k y x"], Float[Tensor, "b k y x"]]:
    """The true histograms, and those with a segment's predictions in place of its masked cells. The target is HOG."""
    assert isinstance(model.target, HOG)
    cells = model.target.patch // model.target.cell
    true = hog(images, model.target.cell)
    grid = model.encoder.grid
    predicted = unpatchify(predict(model, images, masks, splits, segment), cells, grid)
    hidden = magnify(hidden_squares(masks[segment], grid), (true.shape[2], true.shape[3]))
    return true, torch.where(hidden[:, None], predicted, true)


def hidden_pixels(model: MIM, images: Float[Tensor, "b c H W"], mask: Mask) -> Bool[Tensor, "b H W"]:
    """True for masked pixels."""
    return magnify(hidden_squares(mask, model.encoder.grid), (images.shape[2], images.shape[3]))


def in_brown(pictures: Float[Tensor, "b c H W"], thrown: Bool[Tensor, "b H W"]) -> Float[Tensor, "b 3 H W"]:
    """Pictures with thrown pixels in brown."""
    return torch.where(thrown[:, None], BROWN[:, None, None], pictures.expand(-1, 3, -1, -1))


def compose(columns: Sequence[Column], names: Sequence[str], trained: Pretrain, note: str) -> Figure:
    """The figure: the columns of an image side by side, its name below the first, titles above and a note below.

    From four images on, where each has four columns at most, two images share a row.
    """
    abreast = 2 if len(names) > 3 and len(columns) < 5 else 1
    rows = math.ceil(len(names) / abreast)
    height = 2.0 * trained.size[0] / trained.size[1]
    figure = Figure(figsize=(2.1 * len(columns) * abreast, rows * height + 0.8), dpi=130, layout="constrained")
    axes = figure.subplots(rows, len(columns) * abreast, squeeze=False).reshape(rows * abreast, len(columns))
    for row, name in enumerate(names):
        for axis, (_, pictures, *outlined) in zip(axes[row], columns, strict=True):
            draw(axis, pictures[row], trained.size, *(None if cells is None else cells[row] for cells in outlined))
        axes[row][0].set_xlabel(
            shortened(name, 30 * len(columns)), loc="left", fontsize=7, labelpad=2, parse_math=False
        )
    for axis in axes[len(names) :].flat:
        axis.set_axis_off()
    for image in axes[:abreast]:
        for axis, column in zip(image, columns, strict=True):
            axis.set_title(column.title, fontsize=10 if len(column.title) < 20 else 7)
    figure.supxlabel(note, fontsize=8)
    return figure


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
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
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
