"""Recipes under one budget: planned, trained and evaluated side by side, one page.

A comparison is a folder. plan.json holds what each recipe does with the budget; cells/ has a folder for each row and seed: what the
process there has to do (cell.json), its run folders, what it says (log.txt) and, when it is finished, what it found (result.json).
Everything else follows from these, so that the same command continues a comparison that was stopped or killed.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leanmim.comparison.cells import Cell, cells_of, finetune_epochs, screening_of
from leanmim.comparison.page import page_of
from leanmim.comparison.plan import Entry, planned, told
from leanmim.comparison.processes import Task, failure, places_of, run_tasks
from leanmim.comparison.table import NAMES, Table, promising, rows_of, scores_of
from leanmim.config import Compare, parse_budget
from leanmim.config.base import Images
from leanmim.data import open_source
from leanmim.data.labels import Labels, choose_labels
from leanmim.device import cpus, resolve_device
from leanmim.environment import environment
from leanmim.errors import UserError
from leanmim.files import write_atomically, write_json
from leanmim.planner import available
from leanmim.progress import console_of
from leanmim.run import Run
from leanmim.start import open_start


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
    own = on_this_machine(with_stats(config), device, len(places))
    source, labels = open_source(own.data, own.read_as), choose_labels(own.eval)
    for name in own.weights:  # a wrong one is told before anything is trained
        open_start(name, input_size=own.eval_size, images=Images(channels=own.channels, values=own.values))
    plan = run.folder / "plan.json"
    if plan.is_file():
        entries = [Entry.from_json(values) for values in json.loads(plan.read_text())]
    else:
        entries = planned(own, source, device, places)
    with run.locked():
        write_json(run.config, config.to_json())
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
    size = config.eval_size or max((entry.config.input_size for entry in entries), key=lambda px: px[0] * px[-1])
    title = title_of(config, images, labels, size)
    console = console_of(stderr=True)
    for line in (f"{title}; {len(places)} side by side on {device.type}", *map(told, entries)):
        console.print(line)

    screening = screening_of(config, entries, labels, size) if config.screen else []
    if failed := run_cells(screening, entries, places, "screening"):
        raise UserError("\n  ".join(["not all recipes could be screened:", *map(failure, failed)]))
    hopeful = promising([(cell.name, score) for cell in screening for score in scores_of([cell.result]).values()])
    kept = [entry for entry in entries if entry.title in hopeful or not screening]
    cells = cells_of(config, kept, labels, size)
    facts = environment(device, len(places)) | {
        "fine-tuning": f"recipe small, {finetune_epochs(config, labels)} epochs",
    }

    def written() -> Table:
        """The table of the cells that are finished, in the folder too."""
        rows = rows_of(cells, screening, [entry.title for entry in kept])
        table = Table(title, config.measures, parse_budget(config.budget).kind, rows, config.seeds)
        write(run.folder, table, page_of(table, entries, [*screening, *cells], facts))
        return table

    written()
    failed = run_cells(cells, entries, places, "training", written)
    page = run.folder / "page.html"
    if failed:
        raise UserError(
            "\n  ".join([f"{len(failed)} of {len(cells)} cells failed:", *map(failure, failed)])
            + f"\nThe others are in {page}; the same command tries these again"
        )
    console.print(f"page in {page}")
    return written()


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


def on_this_machine(config: Compare, device: torch.device, jobs: int) -> Compare:
    """The configuration with each training's part of the machine: device, reading processes, memory."""
    changes: dict[str, Any] = {"device": device.type}
    if config.workers < 0:  # where all cores compute, a training reads its own images
        changes["workers"] = max(0, cpus() // jobs - 1) if device.type == "cuda" else 0
    if config.memory == "auto" and device.type != "cuda":  # a GPU has one training, which asks it
        changes["memory"] = str(available(device) // jobs)
    return replace(config, **changes)


def title_of(config: Compare, images: int, labels: Labels, size: tuple[int, ...]) -> str:
    """What was compared on what."""
    return (
        f"{images:,} images to pre-train on, --budget {config.budget}, seeds: {config.seeds}; evaluated on {config.eval}, "
        f"{len(labels.train):,} training and {len(labels.val):,} validation images of {len(labels.classes)} classes, at "
        f"{' x '.join(map(str, size))} px"
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
