"""Pictures: original, masked image, reconstruction."""

import math
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from leanmim.checkpoint import restore
from leanmim.config import Show
from leanmim.data import UNREADABLE, Normalise, centre_crop, list_images, read_image
from leanmim.errors import UserError
from leanmim.masking import Mask, Split, hidden_squares, magnify
from leanmim.mim import MIM
from leanmim.targets import BINS, FLAT, HOG, Pixels, hog, unpatchify

THROWN = torch.tensor([0.95, 0.6, 0.2])  # orange


@torch.no_grad()
def predict(
    model: MIM,
    images: Float[Tensor, "b c H W"],
    masks: Mask | list[Mask],
    splits: list[Split] | None = None,
    block: int = -1,
) -> Float[Tensor, "b n p"]:
    """A segment's predictions of the masked patches, zero for the others."""
    ids, prediction = list(model.predictions(images, masks, splits))[block]
    canvas = torch.zeros(len(images), model.encoder.grid.n, prediction.shape[2], device=images.device)
    return canvas.scatter(1, ids[..., None].expand_as(prediction), prediction)


@torch.no_grad()
def reconstruct(
    model: MIM,
    images: Float[Tensor, "b c H W"],
    masks: Mask | list[Mask],
    splits: list[Split] | None = None,
    block: int = -1,
) -> tuple[Float[Tensor, "b c H W"], Float[Tensor, "b 1 H W"]]:
    """A segment's predictions painted over what is masked for it, the visible as it is. The target is pixels.

    Returns:
        The reconstruction, and 1 where a pixel was masked.
    """
    assert isinstance(model.target, Pixels)
    masks = model.nest(masks) if isinstance(masks, Mask) else masks
    painted = model.target.paint(predict(model, images, masks, splits, block), images)
    hidden = hidden_pixels(model, images, masks[block])
    return torch.where(hidden.bool(), painted, images), hidden


def hidden_pixels(model: MIM, images: Float[Tensor, "b c H W"], mask: Mask) -> Float[Tensor, "b 1 H W"]:
    """1 where a pixel is masked."""
    squares = hidden_squares(mask, model.encoder.grid)
    return magnify(squares, (images.shape[2], images.shape[3]))[:, None].float()


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
        colours[:, :3] = torch.where(thrown.expand_as(bins).flatten()[order, None], THROWN, 1.0)
    colours[:, 3] = strength[order]
    return LineCollection(list(ends.flatten(0, 2)[order].numpy()), colors=colours.numpy(), linewidths=0.8)


def choose_files(sources: tuple[str, ...], data: str, count: int) -> list[Path]:
    """The files given, those in the folders given, or the run's own data: ``count`` evenly spread ones, then the rest.

    Raises:
        UserError: a file or folder is missing, or a folder holds no images.
    """
    files: list[Path] = []
    for source in sources or (data,):
        path = Path(source)
        if not path.exists():
            what = "--images" if sources else "the run's own data"
            raise UserError(f"{what} {source!r}: there is no such file or folder; give images with --images")
        files += [path] if path.is_file() else list_images(path)
    spread = max(1, len(files) // count)
    return [file for start in range(spread) for file in files[start::spread]]


def show(config: Show) -> Path:
    """Draw rows of original, masked image and reconstruction.

    Where patches are thrown (PR-MIM), they are orange in the masked image, and a further column shows them alone, as
    they were filled in. Predictions of per-patch normalised pixels are brought back with the true patch's own mean and
    deviation, and the picture says so.

    Returns:
        The picture.

    Raises:
        UserError: the run or the images cannot be read.
    """
    trained, model, state = restore(config.run)
    model.eval()
    if config.count < 1:
        raise UserError(f"--count {config.count} must be at least 1")
    transform = centre_crop(trained.size)
    tensors: list[Tensor] = []
    names: list[str] = []
    for file in choose_files(config.images, trained.data, config.count):
        if len(tensors) == config.count:
            break
        try:
            tensors.append(transform(read_image(file, trained.channels)))
            names.append(file.name)
        except UNREADABLE as error:
            if file in map(Path, config.images):
                raise UserError(f"--images {str(file)!r} cannot be read as an image: {error}") from error
    if not tensors:
        raise UserError(f"no image of {config.images or trained.data!r} can be read; give others with --images")
    normalise = Normalise(state["mean"], state["std"], torch.device("cpu"))
    images = normalise(torch.stack(tensors))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        masks = model.nest(model.draw_mask(images))
        splits = [model.draw_split(mask) for mask in masks]
    block = len(masks) - 1 if config.block is None else config.block
    if not 0 <= block < len(masks):
        raise UserError(f"--block {block}: this run has {len(masks)} segments, 0 to {len(masks) - 1}")
    mask, split = masks[block], splits[block]
    original = normalise.invert(images)
    hidden = hidden_pixels(model, images, mask)
    masked = torch.where(hidden.bool(), torch.full_like(original, 0.5), original)
    thrown = hidden * hidden_pixels(model, images, Mask(split.visible, split.thrown))
    throws, fills = bool(split.thrown.shape[1]), bool(trained.fill)

    def orange(pictures: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 3 H W"]:
        """With thrown patches in their colour."""
        return torch.where(thrown.bool(), THROWN[:, None, None], pictures.expand(-1, 3, -1, -1))

    if throws:
        masked = orange(masked)
    title = f"masked, {hidden.mean():.0%}" + f", thrown {thrown.mean():.0%} (orange)" * throws
    columns: list[tuple[str, Tensor]] = [("original", original), (title, masked)]
    note = f"{trained.recipe}, {trained.model}, step {state['step']}"
    note += f", segment {block} of 0 to {len(masks) - 1}" * (len(masks) > 1)
    if isinstance(model.target, HOG):
        true, predicted = histograms(model, images, masks, splits, block)
        columns += [("HOG", true), ("HOG, predicted where masked", predicted)]
        flat = (true.unflatten(1, (-1, BINS)).norm(dim=2) < 0.999).float().mean()
        note += f"\nvisible cells are the true ones; flat cells (norm under {FLAT}): {flat:.1%}"
        note += ("; orange: filled in" if fills else "; thrown cells are empty") * throws
    else:
        per_patch = trained.target == "pixels"
        painted, _ = reconstruct(model, images, masks, splits, block)
        painted = normalise.invert(painted)
        columns += [("reconstruction" + " *" * per_patch, painted if fills or not throws else orange(painted))]
        if throws and fills:
            columns += [("filled in only", torch.where(thrown.bool(), painted, torch.ones_like(painted)))]
        if per_patch:
            note += "\n* predicted patches brought back with the true patch's own mean and deviation"

    height = 2.0 * trained.size[0] / trained.size[1]
    figure = Figure(figsize=(2.1 * len(columns), len(tensors) * height + 0.8), dpi=130, layout="constrained")
    axes = figure.subplots(len(tensors), len(columns), squeeze=False)
    for row, name in enumerate(names):
        for column, (title, pictures) in enumerate(columns):
            axis = axes[row][column]
            orange_cells = thrown[row, 0].bool() if throws and title.startswith("HOG, predicted") else None
            draw(axis, pictures[row], trained.size, trained.hog_cell, orange_cells)
            if row == 0:
                axis.set_title(title, fontsize=10 if len(title) < 20 else 7)
        axes[row][0].set_ylabel(name if len(name) < 25 else name[:22] + "...", fontsize=7)
    figure.supxlabel(note, fontsize=7)
    name = "reconstructions" + (f"-block{block}" if config.block is not None else "")
    path = Path(config.out) if config.out else Path(config.run) / f"{name}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written ({error}); give the name of a picture with --out") from error
    return path


def histograms(
    model: MIM, images: Float[Tensor, "b c H W"], masks: list[Mask], splits: list[Split], block: int
) -> tuple[Float[Tensor, "b k y x"], Float[Tensor, "b k y x"]]:
    """The true histograms, and those predicted for what is masked among the true ones of what is seen."""
    assert isinstance(model.target, HOG)
    cells = model.target.patch // model.target.cell
    true = hog(images, model.target.cell)
    grid = model.encoder.grid
    predicted = unpatchify(predict(model, images, masks, splits, block), cells, grid)
    hidden = magnify(hidden_squares(masks[block], grid), (true.shape[2], true.shape[3]))
    return true, torch.where(hidden[:, None], predicted, true)


def draw(
    axis: Axes,
    picture: Float[Tensor, "c y x"],
    size: tuple[int, int],
    cell: int,
    thrown: Bool[Tensor, "H W"] | None = None,
) -> None:
    """An image, or histograms as strokes on black (orange ones where thrown), on an axis of the image's size."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    if picture.shape[1:] == size:
        pixels = picture.permute(1, 2, 0).squeeze(-1).numpy()
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axis.imshow(torch.zeros(size).numpy(), cmap="gray", vmin=0, vmax=1)
        cells = None if thrown is None else thrown[cell // 2 :: cell, cell // 2 :: cell]
        axis.add_collection(strokes(picture, cell, cells), autolim=False)
