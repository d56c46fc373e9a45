"""What run folders hold so far, read for the page."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from leanmim.config import Pretrain
from leanmim.config.base import Config
from leanmim.config.finetune import Finetune
from leanmim.errors import UserError
from leanmim.page.html import Html
from leanmim.run import PICTURES, Run

AXES = ("epoch", "million images", "minutes", "PFLOP")


@dataclass(frozen=True)
class Loaded:
    """The contents of a run folder, and the run's name and colour on the page.

    What the run has not written yet is empty. Pictures are PNG.
    """

    folder: Path
    name: str
    colour: str
    config: Config
    environment: dict[str, Any]
    cost: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    pictures: dict[str, bytes]
    """Those of `PICTURES` that are there."""

    @property
    def title(self) -> Html:
        """The name behind a dot of the run's colour."""
        return Html(f'<span class="dot" style="background:{self.colour}"></span>{escape(self.name)}')

    def lines(self, key: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have a metric."""
        return [line for line in self.metrics if line.get(key) is not None]

    def values(self, key: str, axis: str = "epoch") -> list[tuple[float, float]]:
        """(x, value) pairs of a metric; x is one of `AXES`. None where that is not known."""
        steps, xs = self.spent(axis)
        pairs = [(float(np.interp(line["step"], steps, xs)), float(line[key])) for line in self.lines(key) if steps]
        return [pair for pair in pairs if math.isfinite(pair[1])]

    def spent(self, axis: str) -> tuple[list[int], list[float]]:
        """Steps, and what had been spent after each of them: epochs, million images, minutes, or training PFLOP."""
        lines = self.lines("seconds") if axis != "epoch" else [line for line in self.metrics if line.get("epoch")]
        steps = [0, *(line["step"] for line in lines)]
        if axis == "epoch":
            return (steps, [0.0, *(line["epoch"] for line in lines)]) if lines else ([], [])
        minutes = accumulate((line["seconds"] / 60 for line in lines), initial=0.0)
        images = accumulate((line["images_per_second"] * line["seconds"] / 1e6 for line in lines), initial=0.0)
        flops = self.cost.get("predicted", {}).get("train_flops_per_image")
        if not lines or (axis == "PFLOP" and not flops):
            return [], []
        return steps, list(minutes) if axis == "minutes" else [
            x * (flops / 1e9 if axis == "PFLOP" else 1.0) for x in images
        ]


@dataclass(frozen=True)
class Pretrained(Loaded):
    """A run of `leanmim pretrain`."""

    config: Pretrain
    reconstructions: bytes
    strips: dict[int, Path]
    """Over training time: see `leanmim.pictures.over_time`."""


@dataclass(frozen=True)
class Finetuned(Loaded):
    """A run of `leanmim finetune`."""

    config: Finetune
    labels: dict[str, Any]
    results: dict[str, Any]
    confusion: bytes
    mistakes: bytes


def pretrained(runs: Iterable[Loaded]) -> list[Pretrained]:
    """The runs of `leanmim pretrain`."""
    return [run for run in runs if isinstance(run, Pretrained)]


def finetuned(runs: Iterable[Loaded]) -> list[Finetuned]:
    """The runs of `leanmim finetune`."""
    return [run for run in runs if isinstance(run, Finetuned)]


def by_kind(runs: Sequence[Loaded]) -> dict[str, list[Loaded]]:
    """The runs of each command, by a heading; commands without runs are left out."""
    kinds = {"Pre-training": list[Loaded](pretrained(runs)), "Fine-tuning": list[Loaded](finetuned(runs))}
    return {heading: own for heading, own in kinds.items() if own}


def load(folder: Path, name: str, colour: str) -> Loaded:
    """Read a run folder; all files but the configuration may be missing.

    Raises:
        UserError: it has no configuration, or one that cannot be read.
    """
    run = Run(folder)
    if not run.config.is_file():
        raise UserError(
            f"{str(folder)!r} is not a run folder of `leanmim pretrain` or `leanmim finetune`: it has no config.json"
        )
    try:
        values = json.loads(run.config.read_text(encoding="utf-8"))
        config: Pretrain | Finetune = (Finetune if "start" in values else Pretrain).from_json(values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(run.config)!r} cannot be read ({error}); put back the one that this version of leanmim wrote, "
            "or leave the run out"
        ) from error
    shared: dict[str, Any] = {
        "folder": folder,
        "name": name,
        "colour": colour,
        "environment": read_object(folder / "environment.json"),
        "cost": read_object(run.cost),
        "metrics": read_lines(run.metrics),
        "evaluations": read_lines(run.evaluations),
        "skipped": read_lines(run.skipped),
        "changes": read_lines(run.changes),
        "pictures": {name: png for name in PICTURES if (png := read_bytes(folder / f"{name}.png"))},
    }
    if isinstance(config, Pretrain):
        drawn = read_bytes(folder / "reconstructions.png")
        return Pretrained(config=config, reconstructions=drawn, strips=run.strips(), **shared)
    return Finetuned(
        config=config,
        labels=read_object(folder / "labels.json"),
        results=read_object(folder / "results.json"),
        confusion=read_bytes(folder / "confusion.png"),
        mistakes=read_bytes(folder / "mistakes.png"),
        **shared,
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    return next(iter(parse([read(path)])), {})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; empty if there is none."""
    return parse(read(path).splitlines())


def read_bytes(path: Path) -> bytes:
    """What a file holds; empty if there is none."""
    return path.read_bytes() if path.is_file() else b""


def read(path: Path) -> str:
    """The text of a file; empty if there is none."""
    return read_bytes(path).decode(errors="replace")


def parse(texts: Iterable[str]) -> list[dict[str, Any]]:
    """The JSON objects in texts; a text that a killed process left incomplete is skipped."""
    found = []
    for text in texts:
        with suppress(ValueError):
            found.append(json.loads(text))
    return found
