"""Draws the pictures of the methods, with leanmim's own masks, targets and schedules, on the photos of the demo.

python docs/draw.py

writes docs/pictures/*.webp. Backgrounds are transparent and titles grey, so that they suit light and dark pages.
"""

from dataclasses import replace
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from leanmim.config import Pretrain
from leanmim.data import Files, Normalise, centre_crop
from leanmim.factory import build
from leanmim.masking import Grid, hidden_squares, magnify, squares
from leanmim.mim import MIM
from leanmim.pictures.figures import draw, outline
from leanmim.pictures.reconstructions import hidden_pixels
from leanmim.recipes import BIM, FASTMIM, FASTMIM_P, MAE, PR_MIM, SIMMIM
from leanmim.schedule import phases
from leanmim.targets import TARGETS, hog, unpatchify

HERE = Path(__file__).parent
GREY, BLUE, ORANGE = "#808080", (0.22, 0.46, 0.75), (0.93, 0.55, 0.14)
STYLE = {
    "text.color": GREY, "font.size": 9, "axes.titlesize": 9, "axes.titlecolor": GREY,
    "savefig.transparent": True,
    "savefig.bbox": "tight", "savefig.pad_inches": 0.05,
}  # fmt: skip
NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.device("cpu"))  # ImageNet's


def photo(name: str, size: int) -> Tensor:
    """The centre of a photo of the demo, normalised: 1 3 size size."""
    folder = HERE.parent / "demo" / "photos"
    source = Files("", [folder / f"{name}.jpg"], MAE.read_as)
    return NORMALISE(centre_crop((size, size))(source.read(0))[None])


def small(recipe: Pretrain) -> MIM:
    """A recipe as a model; how large it is changes no mask."""
    torch.manual_seed(3)
    return build(replace(recipe, model="convnext_atto" if recipe.masking == "pixel" else "vit_tiny_patch16_224"))


def panels(*titles: str, widths: list[int] | None = None, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A row of empty axes with titles."""
    figure = Figure(figsize=(2.3 * len(titles), height), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False, width_ratios=widths)[0]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_axis_off()
    return figure, list(axes)


def paint(axis: Axes, image: Tensor, alpha: Tensor | None = None) -> None:
    """A normalised image, 1 3 H W, with the opacity of each pixel, 1 H W."""
    pixels = NORMALISE.invert(image)[0].clamp(0, 1)
    if alpha is not None:
        pixels = torch.cat([pixels, alpha.float()])
    axis.imshow(pixels.permute(1, 2, 0).numpy())


def tint(axis: Axes, ids: Tensor, model: MIM, size: int, colour: tuple[float, float, float]) -> None:
    """Cover the patches ``ids``, 1 k, and draw their edges."""
    cells = squares(ids, model.encoder.grid)
    alpha = magnify(cells, (size, size)).float() * 0.85
    axis.imshow(torch.cat([torch.tensor(colour)[:, None, None].expand(3, size, size), alpha]).permute(1, 2, 0).numpy())
    for one in cells[0].flatten().nonzero():  # patch by patch, not the outline of all
        axis.add_collection(outline(squares(one[None], model.encoder.grid)[0], model.encoder.stride, "white"))


def maskings() -> Figure:
    """How a mask reaches the backbone: dropped, replaced by a token, painted on the image."""
    figure, axes = panels(
        "the photo", "drop: masked patches\nare left out", "token: a learned token\nin squares of 32 px",
        "pixel: a learned colour\npainted on the image",
    )  # fmt: skip
    paint(axes[0], photo("kitten", 224))
    for axis, recipe in zip(axes[1:], (MAE, SIMMIM, FASTMIM), strict=True):
        model, image = small(recipe), photo("kitten", recipe.size[0])
        (mask,) = model.draw_masks(image)
        if recipe.masking == "pixel":
            with torch.no_grad():
                paint(axis, model.encoder.embed(image, mask))
            continue
        hidden = hidden_pixels(model, image, mask)
        paint(axis, image, ~hidden)
        if recipe.masking == "token":
            grid = model.encoder.grid
            axis.imshow(torch.where(hidden[0], 0.5, torch.nan).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.add_collection(outline(hidden_squares(mask, grid)[0], model.encoder.stride, GREY))
    return figure


def targets() -> Figure:
    """What is predicted, of the whole photo."""
    figure, axes = panels(
        "raw-pixels: the photo",
        "pixels: each patch less its mean,\nby its own deviation",
        "hog: directions of edges\nin cells of 8 px",
    )
    image = photo("macaw", 128)
    paint(axes[0], image)
    values = unpatchify(TARGETS["pixels"](16, 3, 8)(image), 16, Grid(8, 8))
    axes[1].imshow((values[0] / 4 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())
    draw(axes[2], hog(image)[0], (128, 128))
    return figure


def thrown() -> Figure:
    """PR-MIM: which masked patches are decoded, chosen at random and furthest from each other."""
    figure, axes = panels("visible, masked", "--select random", "--select furthest", height=2.8)
    image = photo("lemur", 224)
    for axis, select in zip(axes[1:], ("random", "furthest"), strict=True):
        model = small(replace(PR_MIM, select=select))
        (mask,) = model.draw_masks(image)  # the same in both
        split = model.draw_splits([mask])[0]
        paint(axis, image, ~hidden_pixels(model, image, mask))
        tint(axis, split.kept, model, 224, BLUE)
        tint(axis, split.thrown, model, 224, ORANGE)
    paint(axes[0], image, ~hidden_pixels(model, image, mask))
    legend = [Patch(color=BLUE, label="decoded"), Patch(color=ORANGE, label="thrown, filled in from the others")]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    return figure


def segments() -> Figure:
    """BIM: what each segment sees; what the segment before still saw is tinted."""
    model, image = small(BIM), photo("kingfisher", 224)
    masks = model.draw_masks(image)
    ratios = [f"segment {i + 1}\n{ratio:.0%} masked" for i, ratio in enumerate(model.mask_ratios)]
    figure, axes = panels(*ratios, height=2.8)
    for i, (axis, mask) in enumerate(zip(axes, masks, strict=True)):
        paint(axis, image, ~hidden_pixels(model, image, mask))
        if i:
            before = set(masks[i - 1].visible[0].tolist())
            tint(axis, torch.tensor([sorted(before - set(mask.visible[0].tolist()))]), model, 224, ORANGE)
    figure.legend(
        handles=[Patch(color=ORANGE, label="seen by the segment before, no longer by this one")],
        loc="outside lower center",
        frameon=False,
    )
    return figure


def growing() -> Figure:
    """FastMIM-P: the input of each phase, in true proportion, cut into patches of 32 px."""
    table = phases(replace(FASTMIM_P, epochs=100))
    sizes = [phase.config.size[0] for phase in table]
    titles = [
        f"{side} px,\n{phase.start:.0f} to {phase.stop:.0f} % of the epochs"
        for side, phase in zip(sizes, table, strict=True)
    ]
    figure, axes = panels(*titles, widths=sizes, height=3.1)
    for axis, side in zip(axes, sizes, strict=True):
        paint(axis, photo("castle", side))
        for at in range(32, side, 32):
            axis.axhline(at - 0.5, color="white", linewidth=0.7)
            axis.axvline(at - 0.5, color="white", linewidth=0.7)
        axis.set_anchor("S")
    return figure


def main() -> None:
    """Draw all."""
    (HERE / "pictures").mkdir(exist_ok=True)
    with rc_context(STYLE):
        for picture in (maskings, targets, thrown, segments, growing):
            path = HERE / "pictures" / f"{picture.__name__}.webp"
            picture().savefig(path, pil_kwargs={"quality": 82, "method": 6})
            print(path, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
