"""The commands of a cell do what the cell does."""

import shlex
from dataclasses import replace
from pathlib import Path

from leanmim.cli import parse
from leanmim.comparison.cells import cells_of
from leanmim.comparison.commands import commands_of
from leanmim.data.labels import choose_labels
from tests.comparison.fakes import tiny_comparison
from tests.comparison.test_cells import entries


def test_the_commands_are_read_as_the_configurations_of_the_cell(tmp_path: Path) -> None:
    config = tiny_comparison(
        tmp_path, recipes=("mae:flip=0.0", "bim:segments=2"), measures=("finetune", "attentive", "linear", "knn"), seeds=2,
        label_share=0.5, weights=("vit_tiny_patch16_224.augreg_in21k",), memory="8GiB", workers=0,
    )  # fmt: skip
    for cell in cells_of(config, entries(config), choose_labels(config.eval), (32,)):
        found = {
            name: own
            for name, own in (parse(shlex.split(line)[1:]) for line in commands_of(cell) if " RUN " not in line)
        }
        if cell.kind == "recipe":
            assert found == {"pretrain": cell.pretrain, "evaluate": cell.evaluate, "finetune": cell.finetune}
        elif cell.kind == "weights":
            assert found == {"evaluate": cell.evaluate, "finetune": cell.finetune}
        else:
            assert found == ({"finetune": cell.finetune} if cell.kind == "untrained" else {})
            _, own = parse(shlex.split(next(iter(commands_of(cell))).partition(" # ")[0])[1:])
            assert own == replace(
                cell.evaluate, run="RUN", model=None, model_kwargs={}, depth=None,
                baselines=("random" if cell.kind == "untrained" else "pixels",),
            )  # fmt: skip
