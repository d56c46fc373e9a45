"""`leanmim show`: pictures of what a run does."""

from pathlib import Path

from leanmim.config import Show
from leanmim.errors import CannotWrite
from leanmim.pictures.figures import draw, save_figure
from leanmim.pictures.images import stretched
from leanmim.pictures.reconstructions import reconstructions

__all__ = ["draw", "save_figure", "show", "stretched"]


def show(config: Show) -> Path:
    """Draw a picture of a run.

    Returns:
        The picture.

    Raises:
        UserError: the run or the images cannot be read, there is no such segment, or the picture cannot be written.
    """
    config.check()
    figure = reconstructions(config)
    default = "reconstructions.png" if config.segment is None else f"reconstructions-segment{config.segment}.png"
    path = Path(config.out) if config.out else Path(config.run) / default
    try:
        save_figure(figure, path)
    except CannotWrite as error:
        raise CannotWrite(f"{error}, or give the name of another picture with --out") from error
    return path
