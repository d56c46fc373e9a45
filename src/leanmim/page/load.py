"""What a run folder holds so far, read for the page."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.page.html import Html
from leanmim.run import Run


class Loaded(NamedTuple):
    """The contents of a run folder, and the run's name and colour on the page.

    What the run has not written yet is empty.
    """

    name: str
    colour: str
    config: Pretrain
    environment: dict[str, Any]
    cost: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    picture: bytes  # PNG

    @property
    def title(self) -> Html:
        """The name behind a dot of the run's colour."""
        return Html(f'<span class="dot" style="background:{self.colour}"></span>{escape(self.name)}')

    def values(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) pairs of a metric."""
        per_epoch = next((line["step"] / line["epoch"] for line in self.metrics if line.get("epoch")), math.inf)
        pairs = [(line["step"] / per_epoch, float(line[key])) for line in self.metrics if key in line]
        return [pair for pair in pairs if per_epoch < math.inf and math.isfinite(pair[1])]


def load(folder: Path, name: str, colour: str) -> Loaded:
    """Read a run folder; all files but the configuration may be missing.

    Raises:
        UserError: it has no configuration, or one that cannot be read.
    """
    run = Run(folder)
    if not run.config.is_file():
        raise UserError(f"{str(folder)!r} is not a run folder of `leanmim pretrain`: it has no config.json")
    try:
        config = Pretrain.from_json(json.loads(run.config.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(run.config)!r} cannot be read ({error}); put back the one that this version of leanmim wrote, "
            "or leave the run out"
        ) from error
    picture = folder / "reconstructions.png"
    return Loaded(
        name=name,
        colour=colour,
        config=config,
        environment=read_object(folder / "environment.json"),
        cost=read_object(run.cost),
        metrics=read_lines(run.metrics),
        evaluations=read_lines(run.evaluations),
        skipped=read_lines(run.skipped),
        picture=picture.read_bytes() if picture.is_file() else b"",
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    return next(iter(parse([read(path)])), {})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; empty if there is none."""
    return parse(read(path).splitlines())


def read(path: Path) -> str:
    """The text of a file; empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def parse(texts: Iterable[str]) -> list[dict[str, Any]]:
    """The JSON objects in texts; a text that a killed process left incomplete is skipped."""
    found = []
    for text in texts:
        with suppress(ValueError):
            found.append(json.loads(text))
    return found
