"""Pictures: original, masked image, reconstruction."""

from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from leanmim.checkpoint import restore
from leanmim.config import Show
from leanmim.data import UNREADABLE, Normalise, centre_crop, list_images, read_image
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask
from leanmim.mim import MIM
from leanmim.targets import unpatchify


@torch.no_grad()
def reconstruct(
    model: MIM, images: Float[Tensor, "b c H W"], mask: Mask
) -> tuple[Float[Tensor, "b c H W"], Float[Tensor, "b 1 H W"]]:
    """The last segment's predictions painted over the masked patches, the visible ones as they are.

    Returns:
        The reconstruction, and 1 where a pixel was masked.
    """
    *_, (ids, prediction) = model.predictions(images, mask)
    patch, grid = model.encoder.stride, model.encoder.grid
    places = ids[..., None]
    canvas = torch.zeros(len(images), grid.n, prediction.shape[2], device=images.device)
    painted = model.target.paint(canvas.scatter(1, places.expand_as(prediction), prediction), images)
    hidden = torch.zeros(len(images), grid.n, patch**2, device=images.device)
    hidden = unpatchify(hidden.scatter(1, places.expand(-1, -1, patch**2), 1.0), patch, Grid(*grid))
    return torch.where(hidden.bool(), painted, images), hidden


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

    Predictions of per-patch normalised pixels are brought back with the true patch's own mean and deviation,
    and the picture says so.

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
        mask = model.draw_mask(images)
    painted, hidden = reconstruct(model, images, mask)
    original = normalise.invert(images)
    masked = torch.where(hidden.bool(), torch.full_like(original, 0.5), original)

    per_patch = trained.target == "pixels"
    titles = ("original", f"masked, {hidden.mean():.0%}", "reconstruction" + " *" * per_patch)
    height = 2.0 * trained.size[0] / trained.size[1]
    figure = Figure(figsize=(6.3, len(tensors) * height + 0.8), dpi=130, layout="constrained")
    axes = figure.subplots(len(tensors), 3, squeeze=False)
    for row, name in enumerate(names):
        for column, picture in enumerate((original, masked, normalise.invert(painted))):
            axis = axes[row][column]
            pixels = picture[row].permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(titles[column], fontsize=10)
        axes[row][0].set_ylabel(name if len(name) < 25 else name[:22] + "...", fontsize=7)
    note = f"{trained.recipe}, {trained.model}, step {state['step']}"
    if per_patch:
        note += "\n* predicted patches brought back with the true patch's own mean and deviation"
    figure.supxlabel(note, fontsize=7)
    path = Path(config.out) if config.out else Path(config.run) / "reconstructions.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written ({error}); give the name of a picture with --out") from error
    return path
