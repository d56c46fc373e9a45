"""Pictures over training time: strips that pre-training leaves, and the figure of them.

A strip is a PNG of tiles, a row for each image: original, masked image, with HOG the true histograms, and last the
reconstruction at that step. b images, c channels, H W pixels.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Real, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from leanmim.config import Pretrain, Show
from leanmim.data import UNREADABLE, Normalise
from leanmim.errors import UserError
from leanmim.files import write_atomically
from leanmim.masking import magnify
from leanmim.mim import MIM
from leanmim.pictures.figures import draw
from leanmim.pictures.layout import Column
from leanmim.pictures.reconstructions import hidden_parts, make_columns
from leanmim.run import Run
from leanmim.targets import HOG, Pixels

LEGIBLE = 192  # px, below which strokes blur
Tile = UInt8[np.ndarray, "H W 3"]


@torch.no_grad()
def write_strip(
    path: Path, trained: Pretrain, model: MIM, normalise: Normalise, pictures: Real[Tensor, "b c H W"], seed: int
) -> bool:
    """Write the strip of a model as it is now. Its mode stays, and no generator moves.

    Args:
        path: to write.
        trained: the configuration of the phase.
        model: on the device of ``normalise``.
        normalise: to the model's input.
        pictures: what to reconstruct, as read.
        seed: of the masks.

    Returns:
        False where the target has no reconstruction: then nothing is written.

    Raises:
        CannotWrite: of the disk.
    """
    if not isinstance(model.target, HOG | Pixels):
        return False
    mode = model.training
    model.eval()
    try:
        images = normalise(pictures)
        masks, splits = hidden_parts(model, images, seed)
        with torch.compiler.set_stance("force_eager"):  # for one batch of another size nothing is compiled
            columns, _ = make_columns(trained, model, normalise, images, masks, splits, [len(masks) - 1])
    finally:
        model.train(mode)
    strokes = isinstance(model.target, HOG)
    columns = columns[: 4 if strokes else 3]  # not what was filled in alone
    zoom = max(1, LEGIBLE // min(trained.size)) if strokes else 1
    rows = [np.hstack([tile(column, row, trained.size, zoom) for column in columns]) for row in range(len(images))]
    noted = PngInfo()
    noted.add_text("rows", str(len(rows)))
    noted.add_text("columns", str(len(columns)))
    strip = Image.fromarray(np.vstack(rows))
    write_atomically(path, lambda file: strip.save(file, "PNG", pnginfo=noted))
    return True


def tile(column: Column, row: int, size: tuple[int, int], zoom: int) -> Tile:
    """A picture of a column, each pixel ``zoom`` px large; HOG is drawn."""
    picture = column.pictures[row].cpu()
    if picture.shape[1:] == size:
        pixels = (255 * picture).round().to(torch.uint8).expand(3, -1, -1)
        return magnify(pixels, (zoom * size[0], zoom * size[1])).permute(1, 2, 0).numpy()
    height, width = zoom * size[0], zoom * size[1]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    outlined = (None if cells is None else cells[row].cpu() for cells in (column.visible, column.thrown))
    draw(figure.add_axes((0, 0, 1, 1)), picture, size, *outlined)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:height, :width, :3]


def read_strip(path: Path) -> tuple[list[Image.Image], int]:
    """The columns of a strip, and how many tiles each has.

    Raises:
        UserError: it is damaged.
    """
    try:
        with Image.open(path) as strip:
            strip.load()
            rows, columns = int(strip.info["rows"]), int(strip.info["columns"])
        width = strip.width // columns
    except (*UNREADABLE, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{str(path)!r} cannot be read as pre-training wrote it ({error}); remove it") from error
    return [strip.crop((x, 0, x + width, strip.height)) for x in range(0, columns * width, width)], rows


def in_columns(strips: dict[int, Path]) -> tuple[dict[str, Image.Image], int]:
    """What strips show, by titles: what is the same in all, then the reconstruction of each step; and how many tiles each column has.

    Raises:
        UserError: one is damaged.
    """
    columns: dict[str, Image.Image] = {}
    for step, path in strips.items():
        (*fixed, last), rows = read_strip(path)
        columns = dict(zip(("original", "masked", "HOG"), fixed, strict=False)) | columns | {f"step {step:,}": last}
    return columns, rows


def over_time(config: Show) -> Figure:
    """Rows of images, columns of steps: what pre-training drew as it went.

    Raises:
        UserError: images are given, the run left no such pictures, or one of them is damaged.
    """
    if config.images:
        raise UserError("--picture over-time draws what pre-training left, of images of its own; leave --images out")
    run = Run(Path(config.run))
    strips = run.strips()
    if not strips:
        raise UserError(
            f"{str(run.folder)!r} has no pictures over training time; pre-training draws them with --show-every"
        )
    columns, rows = in_columns(strips)
    count, original = min(config.most, rows), columns["original"]
    height = 1.4 * original.height / rows / original.width
    figure = Figure(figsize=(1.45 * len(columns), count * height + 0.4), dpi=130, layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    for place, (title, column) in enumerate(columns.items()):
        axes[0][place].set_title(title, fontsize=9)
        for axis, pixels in zip(axes[:, place], np.split(np.asarray(column), rows), strict=False):
            axis.imshow(pixels, interpolation="bicubic")
            axis.set_axis_off()
    return figure
