"""Pictures: original, masked image, reconstruction.

b batch, c channels, H W pixels, n patches, p target width, k values of a HOG cell, y x cells.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

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

ORANGE = torch.tensor([0.95, 0.6, 0.2])  # of thrown patches


class Column(NamedTuple):
    """A column of the figure: images, or HOG. ``thrown`` cells are drawn in orange."""

    title: str
    pictures: Float[Tensor, "b k y x"]
    thrown: Bool[Tensor, "b y x"] | None = None


def show(config: Show) -> Path:
    """Draw rows of original, masked image and reconstruction.

    Where patches are thrown (PR-MIM), they are orange in the masked image, and a further column shows them alone, as
    they were filled in. Predictions of per-patch normalised pixels are brought back with the true patch's own mean and
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
    segment = count - 1 if config.segment is None else config.segment
    if not 0 <= segment < count:
        raise UserError(f"--segment {segment}: this run has {count} segments, 0 to {count - 1}")
    columns, remarks = make_columns(trained, model, normalise, images, masks, splits, segment)
    note = f"{trained.recipe}, {trained.model}, step {state['step']}"
    if count > 1:
        note += f", segment {segment} of 0 to {count - 1}"
    figure = compose(columns, names, trained, "\n".join([note, *remarks]))
    default = "reconstructions.png" if config.segment is None else f"reconstructions-segment{segment}.png"
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
    segment: int,
) -> tuple[list[Column], list[str]]:
    """The columns of the figure and the remarks below it, for one segment; masks and splits are those of all segments."""
    stored = isinstance(trained.read_as, Stored)
    seen = stretched(images) if stored else normalise.invert
    original, fills = seen(images), bool(trained.fill)
    hidden = hidden_pixels(model, images, masks[segment])
    thrown = hidden & magnify(squares(splits[segment].thrown, model.encoder.grid), trained.size)
    masked = torch.where(hidden[:, None], 0.5, original)
    title, throws = f"masked, {hidden.float().mean():.0%}", bool(splits[segment].thrown.numel())
    if throws:
        masked, title = in_orange(masked, thrown), f"{title}, thrown {thrown.float().mean():.0%} (orange)"
    columns, remarks = [Column("original", original), Column(title, masked)], []
    if stored:
        which = f"{'channels 1 to 3' if trained.channels > 2 else 'channel 1'} of {trained.channels}"
        remarks.append(f"{which}, stretched from the 1st to the 99th percentile of each image")
    if isinstance(model.target, HOG):
        true, predicted = histograms(model, images, masks, splits, segment)
        half, cell = model.target.cell // 2, model.target.cell
        cells = thrown[:, half::cell, half::cell] if throws else None  # what the middle of each cell is
        columns += [Column("HOG", true), Column("HOG, predicted where masked", predicted, cells)]
        flat = (true.unflatten(1, (-1, BINS)).norm(dim=2) < 0.999).float().mean()
        remark = f"visible cells are the true ones; flat cells (norm under {FLAT}): {flat:.1%}"
        if throws:
            remark += "; orange: filled in" if fills else "; thrown cells are empty"
        remarks.append(remark)
    elif isinstance(model.target, Pixels):
        painted = seen(reconstruct(model, images, masks, splits, segment)[0])
        title = "reconstruction *" if model.target.per_patch else "reconstruction"
        columns.append(Column(title, in_orange(painted, thrown) if throws and not fills else painted))
        if throws and fills:
            columns.append(Column("filled in only", torch.where(thrown[:, None], painted, 1.0)))
        if model.target.per_patch:
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


def in_orange(pictures: Float[Tensor, "b c H W"], thrown: Bool[Tensor, "b H W"]) -> Float[Tensor, "b 3 H W"]:
    """Pictures with thrown pixels in orange."""
    return torch.where(thrown[:, None], ORANGE[:, None, None], pictures.expand(-1, 3, -1, -1))


def compose(columns: Sequence[Column], names: Sequence[str], trained: Pretrain, note: str) -> Figure:
    """The figure: the columns of an image side by side, its name at their left, titles above and a note below.

    From four images on, where each has three columns at most, two images share a row.
    """
    abreast = 2 if len(names) > 3 and len(columns) < 4 else 1
    rows = math.ceil(len(names) / abreast)
    height = 2.0 * trained.size[0] / trained.size[1]
    figure = Figure(figsize=(2.1 * len(columns) * abreast, rows * height + 0.8), dpi=130, layout="constrained")
    axes = figure.subplots(rows, len(columns) * abreast, squeeze=False).reshape(rows * abreast, len(columns))
    for row, name in enumerate(names):
        for axis, (_, pictures, thrown) in zip(axes[row], columns, strict=True):
            draw(axis, pictures[row], trained.size, None if thrown is None else thrown[row])
        axes[row][0].set_ylabel(shortened(name, 25), fontsize=8, parse_math=False)
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
    axis: Axes, picture: Float[Tensor, "k y x"], size: tuple[int, int], thrown: Bool[Tensor, "y x"] | None
) -> None:
    """An image, or HOG as strokes on black, on an axis of the image's ``size`` (height, width in px)."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    if picture.shape[1:] == size:
        pixels = picture.permute(1, 2, 0).squeeze(-1).numpy()
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
    else:
        axis.imshow(torch.zeros(size).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.add_collection(strokes(picture, size[0] // picture.shape[1], thrown), autolim=False)


def strokes(histogram: Float[Tensor, "k y x"], cell: int, thrown: Bool[Tensor, "y x"] | None = None) -> LineCollection:
    """HOG as it is usually drawn: in each cell a stroke along every edge direction, the brighter the stronger.

    The gradient of bin ``i`` points along ``(sin t, cos t)`` with ``t`` the bin's middle; its edge stands across.
    Strokes are white, those of ``thrown`` cells orange.
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
    colours = torch.ones(len(order), 4)
    if thrown is not None:
        colours[:, :3] = torch.where(thrown.expand_as(bins).flatten()[order, None], ORANGE, 1.0)
    colours[:, 3] = strength[order]
    return LineCollection(list(ends.flatten(0, 2)[order].numpy()), colors=colours.numpy(), linewidths=0.8)
