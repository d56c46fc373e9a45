"""`leanmim show`: pictures of what a run does."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from leanmim.config import Show
from leanmim.errors import CannotWrite
from leanmim.pictures.attention import attention
from leanmim.pictures.features import features
from leanmim.pictures.figures import draw, save_figure
from leanmim.pictures.images import stretched
from leanmim.pictures.maps import embedding_map
from leanmim.pictures.mistakes import mistakes
from leanmim.pictures.neighbours import neighbours
from leanmim.pictures.over_time import progress
from leanmim.pictures.reconstructions import reconstructions

__all__ = ["PICTURES", "draw", "save_figure", "show", "stretched"]

PICTURES: dict[str, Callable[[Show], Figure]] = {
    "reconstructions": reconstructions,
    "progress": progress,
    "features": features,
    "attention": attention,
    "neighbours": neighbours,
    "map": embedding_map,
    "mistakes": mistakes,
}
"""What --picture draws."""


def show(config: Show) -> Path:
    """Draw a picture of a run, or of several.

    Returns:
        The picture.

    Raises:
        UserError: a run or the images cannot be read, there is no such segment, the run is not of a kind that has such a picture, or
            the picture cannot be written.
    """
    config.check()
    figure = PICTURES[config.picture](config)
    name = config.picture if config.segment is None else f"{config.picture}-segment{config.segment}"
    alone = len(config.runs) == 1 and Path(config.run).exists()  # published weights have no folder
    path = Path(config.out) if config.out else (Path(config.run) if alone else Path()) / f"{name}.png"
    try:
        save_figure(figure, path)
    except CannotWrite as error:
        raise CannotWrite(f"{error}, or give the name of another picture with --out") from error
    return path
