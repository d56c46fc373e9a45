"""What a cell does, as commands for a shell."""

import shlex
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace

from leanmim import planner
from leanmim.comparison.cells import FROZEN, Cell
from leanmim.config import Compare, Evaluate, Finetune
from leanmim.recipes import options


def commands_of(cell: Cell) -> Iterator[str]:
    """The commands that do the same; the frozen measures of what is not trained are baselines of a run's."""
    if cell.kind == "recipe":
        assert cell.pretrain is not None
        yield planner.command(cell.pretrain)
    yield from evaluations_of(cell)
    for depth in cell.result.get("depths", {}):
        yield from evaluations_of(cell.at_depth(int(depth)))


def evaluations_of(cell: Cell) -> Iterator[str]:
    """Those that evaluate."""
    if set(cell.measures) & set(FROZEN.values()):
        if cell.kind in ("untrained", "pixels"):
            baseline = "random" if cell.kind == "untrained" else "pixels"
            own = replace(cell.evaluate, model=None, model_kwargs={}, depth=None, stats=None, baselines=(baseline,))
            yield f"{command('evaluate', own, 'RUN')} # RUN: a recipe's of this model and seed"
        else:
            yield command("evaluate", cell.evaluate, cell.evaluate.run)
    if "finetune" in cell.measures and cell.kind != "pixels":
        yield command("finetune", cell.finetune, cell.finetune.start)


def command(name: str, config: Compare | Evaluate | Finetune, *subject: str) -> str:
    """The command of a configuration: what differs from the defaults."""
    values = {own.name: getattr(config, own.name) for own in fields(config) if own.name not in ("run", "start")}
    default = {own.name: {} if own.default is MISSING else own.default for own in fields(config)}
    changed = {key: value for key, value in values.items() if value != default[key]}
    return shlex.join(["leanmim", name, *subject, *options(changed)])
