"""The most confident mistakes of a classifier.

c channels, H W pixels.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from leanmim.config import Show
from leanmim.data import UNREADABLE, centre_crop, images_at
from leanmim.data.labels import Labels
from leanmim.data.read import Picture
from leanmim.errors import UserError
from leanmim.names import shortened
from leanmim.pictures.figures import abreast, draw
from leanmim.pictures.images import drawable
from leanmim.run import run_of
from leanmim.start import open_start

SIZE = (160, 160)  # of a photo, px


class Prediction(NamedTuple):
    """What a classifier says of a labelled image."""

    name: str
    """Of the image: its path."""
    label: str
    predicted: str
    """The likeliest class."""
    probability: float
    """Of that class."""


def worst_mistakes(
    found: Sequence[Prediction], read: Callable[[int], Picture], most: int = 16
) -> list[tuple[Prediction, Picture]]:
    """The wrong predictions of highest probability, the highest first, with their pictures, which ``read`` gives by place; those
    that cannot be read are left out.
    """
    wrong = [place for place, one in enumerate(found) if one.predicted != one.label]
    mistakes: list[tuple[Prediction, Picture]] = []
    for place in sorted(wrong, key=lambda place: -found[place].probability):
        try:
            mistakes.append((found[place], read(place)))
        except UNREADABLE:  # gone since it was classified
            continue
        if len(mistakes) == most:
            break
    return mistakes


def draw_mistakes(mistakes: Sequence[tuple[Prediction, Picture]], note: str = "") -> Figure:
    """Pictures side by side, above each its class and what it was taken for, below it the name of the file; a note at the end."""
    across = max(abreast(len(mistakes), 2.4, 3.0), min(4, len(mistakes)))
    down = -(-len(mistakes) // across)
    figure = Figure(figsize=(2.4 * across + 0.2, 3.0 * down + (0.3 if note else 0)), dpi=100, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    cut = centre_crop(SIZE, 1.0)
    for axis, (one, picture) in zip(axes, mistakes, strict=False):
        draw(axis, drawable(cut(picture)[None])[0], SIZE)
        label, taken = (shortened(name, 28) for name in (one.label, one.predicted))
        title = f"{label}\n\N{RIGHTWARDS ARROW} {taken}, {100 * one.probability:.0f} %"
        axis.set_title(title, fontsize=8, parse_math=False)
        axis.set_xlabel(shortened(Path(one.name).name, 34), fontsize=6, parse_math=False)
    for axis in axes[len(mistakes) :]:
        axis.set_axis_off()
    if note:
        figure.supxlabel(note, fontsize=8)
    return figure


def read_predictions(folder: Path) -> list[Prediction]:
    """What predictions.csv of a run folder says.

    Raises:
        UserError: it is missing, or is none.
    """
    file = folder / "predictions.csv"
    if not file.is_file():
        raise UserError(
            f"{str(folder)!r} has no predictions.csv, which `leanmim finetune` writes at its end; let it go on"
        )
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as table:
            return [
                Prediction(row["path"], row["label"], row["class"], float(row["probability"]))
                for row in csv.DictReader(table)
            ]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{str(file)!r} is damaged ({type(error).__name__}: {error}); the same `leanmim finetune` again writes it"
        ) from error


def mistakes(config: Show) -> Figure:
    """Of a fine-tuned run: the validation images that it was most sure of, and wrong.

    Raises:
        UserError: it is no finished run of `leanmim finetune`, images are given, or there are no mistakes to draw.
    """
    start, run = open_start(config.run), run_of(Path(config.run))
    if not start.classes or not run.labels.is_file():
        raise UserError(f"{config.run!r} is no run folder of `leanmim finetune`: only a classifier makes mistakes")
    if config.images:
        raise UserError("--picture mistakes draws the run's validation images; leave --images out")
    found = read_predictions(run.folder)
    labels = Labels.from_json(run.read_labels())
    source = images_at(labels.root, [one.name for one in found], start.model.read_as)
    chosen = worst_mistakes(found, source.read, config.most)
    wrong = sum(one.predicted != one.label for one in found)
    if not chosen:
        raise UserError(
            f"none of the {wrong} images that {config.run!r} mistakes can be read"
            if wrong
            else f"{config.run!r} makes no mistake on its {len(found)} validation images"
        )
    return draw_mistakes(
        chosen,
        f"fine-tuned, {start.model.model}, step {start.step}: {wrong:,} of {len(found):,} validation images are mistaken "
        f"({wrong / max(1, len(found)):.1%});\nthese are the ones it was most sure of: class \N{RIGHTWARDS ARROW} predicted class, its probability",
    )
