"""`leanmim show`: pictures of what a run does."""

from importlib import import_module
from pathlib import Path

from leanmim.config import Show
from leanmim.errors import CannotWrite
from leanmim.pictures.figures import save_figure

__all__ = ["PICTURES", "save_figure", "show"]

PICTURES = {
    "reconstructions": "reconstructions.reconstructions",
    "over-time": "over_time.over_time",
    "features": "features.features",
    "attention": "attention.attention",
    "neighbours": "neighbours.neighbours",
    "map": "maps.embedding_map",
    "mistakes": "mistakes.mistakes",
}
"""Where the function is that makes the figure of --picture. Imported when it is asked for: scikit-learn takes a second or two, and
every pre-training ends with a picture."""


def show(config: Show) -> Path:
    """Draw a picture of a run, or of several.

    Returns:
        The picture.

    Raises:
        UserError: a run or the images cannot be read, there is no such segment, the run is not of a kind that has such a picture, or
            the picture cannot be written.
    """
    config.check()
    module, function = PICTURES[config.picture].split(".")
    figure = getattr(import_module(f"leanmim.pictures.{module}"), function)(config)
    name = config.picture if config.segment is None else f"{config.picture}-segment{config.segment}"
    alone = len(config.runs) == 1 and Path(config.run).exists()  # published weights have no folder
    path = Path(config.out) if config.out else (Path(config.run) if alone else Path()) / f"{name}.png"
    try:
        save_figure(figure, path)
    except CannotWrite as error:
        raise CannotWrite(f"{error}, or give the name of another picture with --out") from error
    return path
