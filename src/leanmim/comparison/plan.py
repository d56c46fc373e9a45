"""What each recipe does with the budget: numbers that stay, whatever is stopped and continued."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from leanmim.auto import images_a_step, short
from leanmim.comparison.processes import Task, run_tasks
from leanmim.config import Compare, Pretrain
from leanmim.config.base import Precision
from leanmim.config.compare import Budget, parse_budget
from leanmim.costs import count
from leanmim.data import Source, open_source
from leanmim.device import resolve_device, resolve_precision
from leanmim.errors import UserError
from leanmim.files import write_json
from leanmim.names import sides
from leanmim.planner import average_throughput, calibrated, counted_as
from leanmim.processes import ALONE
from leanmim.progress import duration
from leanmim.recipes import titles, variant
from leanmim.train.right_size import trial

CHOSEN = (
    "data",
    "out",
    "seed",
    "epochs",
    "hours",
    "device",
    "workers",
    "memory",
    "channels",
    "values",
    "stats",
    "threads",
    "overwrite",
    "keep",
)
"""Fields that the comparison sets for all recipes."""
SCREENED = 0.1  # of the budget
ROUNDS = 3  # in which the speed is measured


@dataclass(frozen=True)
class Entry:
    """A recipe under the budget."""

    title: str
    config: Pretrain
    """Without data and run folder; its epochs are those of the whole budget."""
    images: int
    """Of an epoch: as many as fill its steps."""
    flops_per_image: int
    """Of training, on average over the phases."""
    speeds: tuple[float, ...] = ()
    """Images per second, as measured; empty where the budget is no time."""
    screen_epochs: int | float = 0
    """Those of a tenth of the budget; 0 without --screen."""

    @property
    def epoch(self) -> dict[str, float]:
        """What an epoch takes of each kind of budget; seconds are 0 where no speed was measured."""
        return {
            "epochs": 1.0,
            "seconds": self.images / median(self.speeds) if self.speeds else 0.0,
            "flops": float(self.images * self.flops_per_image),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"config": self.config.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Entry":
        """The inverse of `to_json`."""
        return cls(**values | {"config": Pretrain.from_json(values["config"]), "speeds": tuple(values["speeds"])})


def recipes_of(config: Compare) -> list[tuple[str, Pretrain]]:
    """The recipes with their titles.

    Raises:
        UserError: there is no such recipe, an option of it is wrong, or two are the same.
    """
    recipes = [replace(variant(spec, config, CHOSEN), data="", out="") for spec in config.recipes]
    named = titles(recipes)
    if twice := {title for title in named if named.count(title) > 1}:
        raise UserError(f"--recipes names {', '.join(sorted(twice))} twice; leave one out, or change an option of it")
    fixed: dict[str, Any] = {"precision": precision_of(config), "compile": False}
    return [
        (title, replace(own, **{name: value for name, value in fixed.items() if getattr(own, name) == "auto"}))
        for title, own in zip(named, recipes, strict=True)
    ]


def precision_of(config: Compare) -> Precision:
    """Of all trainings that are given no other: what each measures for itself could differ among seeds."""
    return "fp32" if resolve_precision("auto", resolve_device(config.device)) is None else "bf16"


def planned(config: Compare, source: Source, device: torch.device, places: Sequence[dict[str, str]]) -> list[Entry]:
    """The entries of a new comparison; nothing is written.

    Args:
        config: of the comparison.
        source: the images to pre-train on.
        device: where it will run.
        places: of the trainings side by side; the speed is measured with as many processes.

    Raises:
        UserError: a recipe cannot be trained, or the budget is less than an epoch of it.
    """
    entries = []
    for title, recipe in recipes_of(config):
        try:
            cost, _ = count(replace(recipe, batch_size=1), counted_as(device))
        except UserError as error:
            raise UserError(f"{title}: {error}") from error
        entries.append(Entry(title, recipe, len(source), cost.train_flops_per_image))
    budget = parse_budget(config.budget)
    if budget.kind == "seconds":
        entries = measured(config, entries, places)
    return [scheduled(entry, budget, config) for entry in entries]


def scheduled(entry: Entry, budget: Budget, config: Compare) -> Entry:
    """The entry with the epochs that the budget allows.

    Raises:
        UserError: not one step, or a recipe that cannot be trained so long.
    """
    whole = with_epochs(entry, budget, f"--budget {config.budget}")
    if config.screen:
        tenth = budget._replace(amount=SCREENED * budget.amount)
        screened = with_epochs(entry, tenth, f"a tenth of --budget {config.budget}, for --screen,")
        whole = replace(whole, screen_epochs=float(screened.config.epochs))
    return whole


def with_epochs(entry: Entry, budget: Budget, called: str) -> Entry:
    """The entry with the epochs of a budget, the last one in part. Errors as for `scheduled`."""
    there = entry.images
    # An automatic batch follows from the epochs, and they from how many images fill an epoch's batches.
    for _ in range(3):
        epochs = short(budget.amount / entry.epoch[budget.kind])
        batch = batch_of(entry.config, epochs, there)
        entry = replace(entry, images=there // batch * batch or there)
    if epochs * entry.images < min(batch, entry.images):
        raise UserError(
            f"{called} is less than one step of {entry.title}: an epoch of {entry.images} images takes "
            f"{duration(entry.epoch['seconds']) + ' and ' if entry.speeds else ''}{entry.epoch['flops'] / 1e12:.3g} TFLOP. Give a larger "
            "--budget, or a smaller --model or --input-size"
        )
    config = replace(entry.config, epochs=epochs)
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{called} is {epochs:g} epochs of {entry.title}: {error}") from error
    return replace(entry, config=config)


def batch_of(recipe: Pretrain, epochs: int | float, images: int) -> int:
    """Images of a step of a training."""
    if recipe.batch_size != "auto":
        return recipe.batch_size * recipe.accum
    return images_a_step(epochs * images, images) if recipe.effective_batch == "auto" else recipe.effective_batch


def told(entry: Entry) -> str:
    """What a recipe does with the budget, for people to read."""
    epochs = float(entry.config.epochs)
    time = (
        f" in {duration(epochs * entry.epoch['seconds'])}, at {median(entry.speeds):.1f} images/s"
        if entry.speeds
        else ""
    )
    return (
        f"{entry.title}: {sides(entry.config.input_size)} px, {epochs:g} {'epoch' if epochs == 1 else 'epochs'}{time}, "
        f"{epochs * entry.epoch['flops'] / 1e12:.4g} TFLOP"
    )


def measured(config: Compare, entries: Sequence[Entry], places: Sequence[dict[str, str]]) -> list[Entry]:
    """The entries with their speeds: of as many processes at once as there will be trainings, each in turns through all recipes, so
    that all meet the machine alike. Whether channels are last is what the first process found to be faster.

    Raises:
        UserError: a recipe cannot be trained.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipes = [entry.config.to_json() for entry in entries]
        write_json(folder / "recipes.json", {"data": config.data, "recipes": recipes})
        tasks = [Task("speeds", f"process {number}", folder / str(number)) for number in range(len(places))]
        if failed := run_tasks(tasks, places, "measuring the speed"):
            raise UserError(f"the speed cannot be measured: {failed[0].log.read_text(errors='replace').strip()}")
        found = [json.loads((task.folder / "result.json").read_text()) for task in tasks]
    last = found[0]["channels_last"]
    speeds = [[speed for one in found for own, speed in one["speeds"] if own == i] for i in range(len(entries))]
    return [
        replace(entry, speeds=tuple(speeds[i]), config=replace(entry.config, channels_last=last[i]))
        for i, entry in enumerate(entries)
    ]


def measure(folder: Path) -> None:
    """In a process of its own: measure all recipes in turns, another one first than its neighbours do."""
    todo = json.loads((folder.parent / "recipes.json").read_text())
    recipes = [Pretrain.from_json(values) for values in todo["recipes"]]
    data, device = todo["data"], resolve_device(recipes[0].device)
    source = open_source(data if isinstance(data, str) else tuple(data), recipes[0].read_as)
    last = [calibrated(recipe, None, source, device).setting.channels_last for recipe in recipes]
    trials = [
        trial(replace(recipe, channels_last=own), source, ALONE, device)
        for recipe, own in zip(recipes, last, strict=True)
    ]
    first = int(folder.name) % len(trials)
    turn = [*range(first, len(trials)), *range(first)]
    speeds = [[place, average_throughput(trials[place], source, device)] for place in turn * ROUNDS]
    write_json(folder / "result.json", {"channels_last": last, "speeds": speeds})
