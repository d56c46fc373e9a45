"""Original, masked image, reconstruction.

b batch, c channels, H W pixels, n patches, p target width, k values of a HOG cell, y x cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from leanmim.config import Pretrain, Show
from leanmim.config.base import Stored
from leanmim.data import Normalise, centre_crop
from leanmim.data.read import Picture
from leanmim.errors import UserError
from leanmim.masking import Mask, Split, hidden_squares, magnify, squares
from leanmim.mim import MIM
from leanmim.names import run_names
from leanmim.pictures.images import read_with, stretched
from leanmim.pictures.layout import Column, Panel, compose
from leanmim.pictures.tiles import Tiling, fitted, tiling
from leanmim.targets import BINS, FLAT, HOG, Pixels, unpatchify, with_levels
from leanmim.weights import restore

Parts = TypeVar("Parts", Mask, Split)
BROWN = torch.tensor([0.66, 0.53, 0.39])  # of thrown patches: as bright as the grey of masked ones


def reconstructions(config: Show) -> Figure:
    """Rows of original, masked image and reconstruction; of several runs side by side, on the same images.

    Of a run in segments (BIM) a column for each, unless one is asked for. Where patches are thrown (PR-MIM), they are brown in
    the masked image, and a further column shows them alone, as they were filled in. Predictions of per-patch normalised pixels
    are brought back with the true patch's own mean and deviation, and the picture says so. A target that is neither pixels nor
    HOG has no reconstruction. Stored values are drawn as `stretched` says.

    Each run draws the images at its own input size, their centres or, in tiles, as a whole. Its masks are drawn from the same seed, so that runs of one grid and ratio
    have the same. The original is drawn again where the size is another than before.

    Raises:
        UserError: a run or the images cannot be read, or there is no such segment.
    """
    panels: list[Panel] = []
    names: list[str] = []
    data: str | tuple[str, ...] = ()
    for run, title in zip(config.runs, run_names(config.runs), strict=True):
        trained, model, state = restore(run)
        data = data or trained.data  # of the first run
        transform: Callable[[Picture], Tensor] = centre_crop(trained.size)
        if config.tiles:
            transform = partial(fitted, tile=trained.size, count=config.tiles, step=model.encoder.stride)
        found, pictures = read_with(transform, config, replace(trained, data=data))
        if names and found != names:
            raise UserError(f"{run!r} and {config.runs[0]!r} cannot read the same images; give --images that both can")
        panel = panel_of(config, trained, model, state, pictures)
        if any(other.sizes == panel.sizes for other in panels):
            panel = panel._replace(columns=panel.columns[1:])
        panels.append(panel._replace(title=title))
        names = found
    return compose(panels, names)


def panel_of(config: Show, trained: Pretrain, model: MIM, state: dict[str, Any], pictures: list[Tensor]) -> Panel:
    """What is drawn of a run; pictures are c H W, each of its own size. Errors as for `reconstructions`."""
    normalise = Normalise(state["mean"], state["std"], torch.device("cpu"))
    tilings = [tiling((own.shape[1], own.shape[2]), trained.size, model.encoder.stride) for own in pictures]
    images = normalise(torch.cat([own.tiles(picture) for own, picture in zip(tilings, pictures, strict=True)]))
    model.target = with_levels(model.target, trained.read_as, state["mean"], state["std"])
    masks, splits = hidden_parts(model.eval(), images, config.seed)
    count, counts = len(masks), [len(own.corners) for own in tilings]
    if config.segment is not None and not 0 <= config.segment < count:
        raise UserError(f"--segment {config.segment}: this run has {count} segments, 0 to {count - 1}")
    segments = range(count) if config.segment is None else [config.segment]
    columns, remarks = make_columns(trained, model, normalise, images, masks, splits, segments, counts)
    columns = [Column(title, *(together(tiles, tilings) for tiles in parts)) for title, *parts in columns]
    note = f"{trained.recipe}, {trained.model}, step {state['step']}"
    if count > 1:
        note += f", {count} segments" if config.segment is None else f", segment {config.segment} of 0 to {count - 1}"
    if config.tiles:
        remarks.append(f"in tiles of {trained.size[0]} x {trained.size[1]} px, each seen alone")
    return Panel(columns, [own.size for own in tilings], note, remarks)


def together(tiles: Any, tilings: Sequence[Tiling]) -> Any:
    """The images that the tiles of a column make; None of None."""
    if tiles is None:
        return None
    parts = tiles.split([len(own.corners) for own in tilings])
    return [own.whole(part) for own, part in zip(tilings, parts, strict=True)]


def hidden_parts(model: MIM, images: Float[Tensor, "b c H W"], seed: int) -> tuple[list[Mask], list[Split]]:
    """The masks of all segments, and what of them is decoded, from a seed: the same on every device, and no other generator moves."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices too
        masks = model.draw_masks(images.cpu())
        splits = model.draw_splits(masks)
    return [moved(mask, images.device) for mask in masks], [moved(split, images.device) for split in splits]


def moved(parts: Parts, device: torch.device) -> Parts:
    """A mask or a split on a device."""
    return parts._replace(**{name: part.to(device) for name, part in parts._asdict().items() if part is not None})


def make_columns(
    trained: Pretrain,
    model: MIM,
    normalise: Normalise,
    images: Float[Tensor, "b c H W"],
    masks: list[Mask],
    splits: list[Split],
    segments: Sequence[int],
    counts: Sequence[int] = (),
) -> tuple[list[Column], list[str]]:
    """The columns of the figure and the remarks below it, for some segments; masks and splits are those of all. The masked image is
    that of the last one. Where images are tiles, ``counts`` says how many make an image.
    """
    stored, throws = isinstance(trained.read_as, Stored), bool(splits[0].thrown.numel())
    seen = stretched(images, counts) if stored else normalise.invert
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
        true = model.target.histograms(images)
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
    true = model.target.histograms(images)
    grid = model.encoder.grid
    predicted = unpatchify(predict(model, images, masks, splits, segment), cells, grid)
    hidden = magnify(hidden_squares(masks[segment], grid), (true.shape[2], true.shape[3]))
    return true, torch.where(hidden[:, None], predicted, true)


def hidden_pixels(model: MIM, images: Float[Tensor, "b c H W"], mask: Mask) -> Bool[Tensor, "b H W"]:
    """True for masked pixels."""
    return magnify(hidden_squares(mask, model.encoder.grid), (images.shape[2], images.shape[3]))


def in_brown(pictures: Float[Tensor, "b c H W"], thrown: Bool[Tensor, "b H W"]) -> Float[Tensor, "b 3 H W"]:
    """Pictures with thrown pixels in brown."""
    return torch.where(thrown[:, None], BROWN.to(pictures.device)[:, None, None], pictures.expand(-1, 3, -1, -1))
