"""Comparisons whose processes are none: cells run here, or results are made up."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from leanmim.comparison.processes import Task
from leanmim.comparison.worker import TASKS
from leanmim.config import Compare
from leanmim.errors import UserError
from leanmim.files import write_json
from tests.helpers import VIT
from tests.runs import noisy_tiles


@dataclass
class Ended:
    """A process that has ended."""

    code: int = 0

    def poll(self) -> int:
        return self.code

    wait = poll

    def stop(self) -> None:
        raise AssertionError("it has ended")


def here(task: Task, place: dict[str, str]) -> Ended:
    """Do a task in this process."""
    task.folder.mkdir(parents=True, exist_ok=True)
    try:
        with patch.dict(os.environ, place):
            TASKS[task.what](task.folder)
    except UserError as error:
        task.log.write_text(f"leanmim: {error}\n")
        return Ended(2)
    return Ended()


def made_up(accuracy: Callable[[dict[str, Any]], float], failing: str = "") -> Callable[[Task, dict[str, str]], Ended]:
    """Instead of processes: every cell has an accuracy, of 1,000 images, by its cell.json; those of a name fail."""

    def launch(task: Task, place: dict[str, str]) -> Ended:
        cell = json.loads((task.folder / "cell.json").read_text())
        if cell["name"] == failing:
            task.log.write_text("step 1\nleanmim: no room\n")
            return Ended(3)
        value = accuracy(cell)
        found = {"value": value, "interval": [value - 0.03, value + 0.03], "images": 1000}
        result: dict[str, Any] = {"accuracies": {measure: found for measure in cell["measures"]}}
        if cell["kind"] == "recipe":
            result["training"] = dict(
                epochs=cell["pretrain"]["epochs"], seconds=60.0, images=320, flops_per_image=10**9,
                predicted_bytes=2**20, measured_bytes=2**21,
            )  # fmt: skip
        write_json(task.folder / "result.json", result)
        return Ended()

    return launch


def tiny_comparison(folder: Path, **changes: Any) -> Compare:
    """Two recipes and two seeds on 24 tiles of three colours."""
    if not (folder / "tiles").exists():
        noisy_tiles(folder / "tiles", 8, 6)
    model, arguments = VIT
    own: dict[str, Any] = dict(
        recipes=("mae:batch-size=24", "pr-mim:batch-size=24"), data=str(folder / "tiles" / "train"), eval=str(folder / "tiles"), out=str(folder / "out"), budget="2epochs", seeds=2,
        measures=("knn", "linear"), model=model, model_kwargs=arguments, input_size=(32,), device="cpu",
    )  # fmt: skip
    return Compare(**own | changes)
