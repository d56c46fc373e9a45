"""`leanmim show`: pictures of what a run does."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from leanmim.config import Show
from leanmim.errors import CannotWrite, UserError
from leanmim.pictures.figures import draw, save_figure
from leanmim.pictures.images import stretched
from leanmim.pictures.over_time import progress
from leanmim.pictures.reconstructions import reconstructions

__all__ = ["draw", "save_figure", "show", "stretched"]

PICTURES: dict[str, Callable[[Show], Figure]] = {"reconstructions": reconstructions, "progress": progress}
"""What --picture draws."""


def show(config: Show) -> Path:
    """Draw a picture of a run, or of several.

    Returns:
        The picture.

    Raises:
        UserError: a run or the images cannot be read, there is no such segment, the run left no pictures over training time, or the
            picture cannot be written.
    """
    config.check()
    if not config.runs:
        raise UserError("give the run folder of a `leanmim pretrain`, or several: leanmim show run")
    figure = PICTURES[config.picture](config)
    name = f"{config.picture}.png" if config.segment is None else f"{config.picture}-segment{config.segment}.png"
    folder = Path(config.runs[0]) if len(config.runs) == 1 else Path()  # a run's own picture shows that run alone
    path = Path(config.out) if config.out else folder / name
    try:
        save_figure(figure, path)
    except CannotWrite as error:
        raise CannotWrite(f"{error}, or give the name of another picture with --out") from error
    return path
