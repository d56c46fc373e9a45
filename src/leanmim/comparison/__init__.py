"""Recipes under one budget: planned, trained and evaluated side by side, one page.

A comparison is a folder. plan.json holds what each recipe does with the budget; cells/ has a folder for each row and seed: what the
process there has to do (cell.json), its run folders, what it says (log.txt) and, when it is finished, what it found (result.json).
Everything else follows from these, so that the same command continues a comparison that was stopped or killed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leanmim.comparison.cells import Cell, cell_of, cells_of, finetune_epochs, finetune_images, screening_of, weights_of
from leanmim.comparison.commands import command
from leanmim.comparison.page import page_of
from leanmim.comparison.plan import Entry, planned, recipes_of, told
from leanmim.comparison.processes import Task, failure, last_words, places_of, run_tasks
from leanmim.comparison.table import NAMES, Table, promising, rows_of, scores_of
from leanmim.config import Compare, Pretrain, parse_budget
from leanmim.config.base import Images
from leanmim.data import open_source
from leanmim.data.labels import Labels, choose_labels
from leanmim.device import cpus, resolve_device
from leanmim.encoders.backbone import backbone_of
from leanmim.environment import environment
from leanmim.errors import UserError
from leanmim.files import write_atomically, write_json
from leanmim.names import sides, slug
from leanmim.planner import available
from leanmim.progress import console_of
from leanmim.run import Run
from leanmim.start import SCRATCH, start_of


def compare(config: Compare) -> Table:
    """Pre-train several recipes under one budget, evaluate all alike, and write a page of what is worth it.

    The same call continues a comparison that was stopped or killed. What trains are processes of their own: they know the recipes that
    are given, but not targets, maskings or sources that a script adds to leanmim's tables.

    The folder gets page.html, table.md, table.csv, table.json, plan.json, and a folder for each training.

    Returns:
        The table; printed, it is Markdown.

    Raises:
        UserError: something in the configuration, the data or the folder is wrong, or a training failed; the others are done all
            the same.
    """
    config.check()
    run = Run(Path(config.out))
    check_folder(config, run)
    device = resolve_device(config.device)
    places = places_of(config, device)
    own = on_this_machine(with_stats(config), device, places)
    source, labels = open_source(own.data, own.read_as), choose_labels(own.eval)
    plan, begun = run.folder / "plan.json", run.folder / "begun.json"
    now = {
        "images to pre-train on": digest(list(source.names)),
        "images to evaluate on": digest([labels.classes, labels.train, labels.val]),
        "device": device.type,
    }
    if plan.is_file():
        check_begun(begun, now, run)
        entries = [Entry.from_json(values) for values in json.loads(plan.read_text())]
    else:
        check_evaluation(own, labels)
        entries = planned(own, source, device, places)
    with run.locked():
        write_json(run.config, config.to_json())
        write_json(begun, now)
        write_json(plan, [entry.to_json() for entry in entries])
        return carried_out(own, run, entries, len(source), labels, device, places)


def carried_out(
    config: Compare,
    run: Run,
    entries: list[Entry],
    images: int,
    labels: Labels,
    device: torch.device,
    places: Sequence[dict[str, str]],
) -> Table:
    """`compare` when all is planned.

    Args:
        config: of the comparison on this machine.
        run: its folder.
        entries: the recipes under the budget.
        images: to pre-train on.
        labels: the images to evaluate on.
        device: where it runs.
        places: of the trainings side by side.
    """
    size = evaluation_size(config, [entry.config for entry in entries])
    title = title_of(config, images, labels, size)
    console = console_of(stderr=True)
    for line in (f"{title}; {len(places)} side by side on {device.type}", *map(told, entries)):
        console.print(line)

    screening = screening_of(config, entries, labels, size) if config.screen else []
    failed = run_cells(screening, entries, places, "screening")
    screened = [cell for cell in screening if cell.result]
    hopeful = promising(
        [(cell.name, score) for cell in screened for score in scores_of([cell.result]).values()], config.screen_share
    )
    kept = [entry for entry in entries if entry.title in hopeful or not screening]
    if not kept:
        raise UserError("\n  ".join(["no recipe could be screened:", *map(failure, failed)]))
    cells = cells_of(config, kept, labels, size)
    facts = environment(device, len(places)) | {
        "command": command("compare", Compare.from_json(run.stored())),
        "fine-tuning": f"recipe small, {finetune_epochs(config, labels)} epochs",
    }

    def written() -> Table:
        """The table of the cells that are finished, in the folder too."""
        rows = rows_of(cells, screened, [entry.title for entry in kept])
        lost = tuple(f"{task.name} ({last_words(task)})" for task in failed)
        table = Table(title, config.measures, parse_budget(config.budget).kind, rows, config.seeds, lost)
        write(run.folder, table, page_of(table, entries, [*screening, *cells], facts))
        return table

    written()
    failed += run_cells(cells, entries, places, "training", written)
    table, page = written(), run.folder / "page.html"
    if failed:
        raise UserError(
            "\n  ".join([f"{len(failed)} of {len(screening) + len(cells)} cells failed:", *map(failure, failed)])
            + f"\nThe others are in {page}; the same command tries these again"
        )
    console.print(f"page in {page}")
    return table


def digest(values: list[Any]) -> str:
    """The same for the same values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def check_begun(begun: Path, now: dict[str, str], run: Run) -> None:
    """Raise UserError if the comparison began with other images or on another kind of device: a table is of one of each."""
    before = json.loads(begun.read_text()) if begun.is_file() else now
    if other := [what for what in now if before[what] != now[what]]:
        raise UserError(
            f"--out {str(run.folder)!r} was begun with other {' and '.join(other)}; give the same ones to continue it, or choose another --out"
        )


def evaluation_size(config: Compare, recipes: Sequence[Pretrain]) -> tuple[int, ...]:
    """At which all are evaluated, px."""
    return config.eval_size or max((recipe.input_size for recipe in recipes), key=lambda px: px[0] * px[-1])


def check_evaluation(config: Compare, labels: Labels) -> None:
    """Raise UserError if a recipe's model or given weights cannot be evaluated, before anything is trained."""
    recipes = recipes_of(config)
    weights = weights_of(config, [recipe for _, recipe in recipes])
    if twice := [names for names in groups_of(config.weights) + groups_of([*weights]) if len(names) > 1]:
        raise UserError(
            f"--weights names {' and '.join(twice[0])}, which are the same or would share a folder; leave one out"
        )
    size = evaluation_size(config, [recipe for _, recipe in recipes])
    for name, with_model in weights.items():
        own = cell_of(with_model, "weights", name, 0, labels, size).evaluate.with_stats()
        backbone_of(start_of(name, own).model, device="meta")
    for title, recipe in recipes:
        own = cell_of(config, "untrained", title, 0, labels, size, recipe).evaluate.with_stats()
        try:
            backbone_of(start_of(SCRATCH, own).model, device="meta")
        except UserError as error:
            raise UserError(f"{title}, evaluated at {sides(size)} px (--eval-size): {error}") from error


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """The names that would have one folder."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(slug(name), []).append(name)
    return list(groups.values())


def check_folder(config: Compare, run: Run) -> None:
    """Raise UserError if --out holds another comparison, or something else."""
    if not run.folder.is_dir() or run.hardly_begun(config):
        return
    stored = run.stored()
    if "recipes" not in stored:
        raise UserError(
            f"--out {str(run.folder)!r} is not empty and not a comparison of leanmim; choose another folder"
        )
    if changes := config.changes(stored):
        raise UserError(
            "\n  ".join([f"--out {str(run.folder)!r} holds another comparison:", *changes])
            + "\nChoose another --out, or give the same options to continue it"
        )


def with_stats(config: Compare) -> Compare:
    """The configuration with the channels and values that --stats gives; errors as for `Images.with_stats`."""
    if config.stats is None:
        return config
    found = Images(stats=config.stats).with_stats()
    assert found.channels is not None
    return replace(config, channels=found.channels, values=found.values)


def on_this_machine(config: Compare, device: torch.device, places: Sequence[dict[str, str]]) -> Compare:
    """The configuration with each training's part of the machine: device, reading processes, memory."""
    jobs = len(places)
    sharing = max(Counter(place.get("CUDA_VISIBLE_DEVICES") for place in places).values())
    changes: dict[str, Any] = {"device": device.type}
    if config.workers < 0:  # where all cores compute, a training reads its own images
        changes["workers"] = max(0, cpus() // jobs - 1) if device.type == "cuda" else 0
    if config.memory == "auto" and sharing > 1:  # a training that has a GPU for itself asks it
        changes["memory"] = str(available(device) // sharing)
    return replace(config, **changes)


def title_of(config: Compare, images: int, labels: Labels, size: tuple[int, ...]) -> str:
    """What was compared on what."""
    few = finetune_images(config, labels)
    tuned = (
        f", fine-tuned with {few:,} of the labels" if "finetune" in config.measures and few < len(labels.train) else ""
    )
    return (
        f"{images:,} images to pre-train on, --budget {config.budget}, seeds: {config.seeds}; evaluated on {config.eval}, "
        f"{len(labels.train):,} training and {len(labels.val):,} validation images of {len(labels.classes)} classes, at "
        f"{sides(size)} px{tuned}"
    )


def run_cells(
    cells: Sequence[Cell],
    entries: Sequence[Entry],
    places: Sequence[dict[str, str]],
    title: str,
    after: Callable[[], object] = lambda: None,
) -> list[Task]:
    """Do the cells that are not finished; ``after`` is called after each. Returns what failed."""
    training = {entry.title: entry for entry in entries}
    tasks = {}
    for cell in cells:
        if not cell.result:
            epochs = float(cell.pretrain.epochs) if cell.kind == "recipe" and cell.pretrain else 0
            tasks[cell.task(epochs * training[cell.name].epoch["seconds"] if epochs else 0.0)] = cell

    def done(task: Task) -> str:
        after()
        return ", ".join(f"{NAMES[measure]} {score} %" for measure, score in scores_of([tasks[task].result]).items())

    return run_tasks(list(tasks), places, title, done)


def write(folder: Path, table: Table, page: str) -> None:
    """Write the page and the table."""
    for name, text in {"page.html": page, "table.md": f"{table}\n", "table.csv": table.csv()}.items():
        content = text.encode("utf-8", "backslashreplace")  # the name of a folder need not be text
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
    write_json(folder / "table.json", table.to_json())
