"""What a cell is, and what it leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leanmim.comparison import cells
from leanmim.comparison.cells import Cell, cell_of, cells_of, finetune_epochs, run_cell, screening_of
from leanmim.comparison.plan import Entry, recipes_of
from leanmim.comparison.table import rows_of
from leanmim.config import Pretrain
from leanmim.data.labels import choose_labels
from tests.comparison.fakes import tiny_comparison
from tests.runs import untrained


def entries(config: Any, epochs: int = 20) -> list[Entry]:
    return [
        Entry(title, replace(recipe, epochs=epochs), 24, 10**9, screen_epochs=2) for title, recipe in recipes_of(config)
    ]


def test_seed_by_seed_the_baselines_first(tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path, weights=("some.weights",))
    found = cells_of(config, entries(config), choose_labels(config.eval), (32,))
    assert [(cell.kind, cell.seed) for cell in found] == [
        ("untrained", 0), ("pixels", 0), ("weights", 0), ("recipe", 0), ("recipe", 0),
        ("untrained", 1), ("weights", 1), ("recipe", 1), ("recipe", 1),
    ]  # fmt: skip
    assert len({cell.folder for cell in found}) == len(found)
    assert not any(
        cell.kind == "pixels"
        for cell in cells_of(
            replace(config, measures=("finetune",)), entries(config), choose_labels(config.eval), (32,)
        )
    )


def test_weights_that_are_called_as_a_recipe_have_a_folder_of_their_own(tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path, weights=("mae",), seeds=1)
    found = cells_of(config, entries(config), choose_labels(config.eval), (32,))
    assert len({cell.folder for cell in found}) == len(found) == 5
    rows = rows_of(found)
    assert [(row.kind, row.name) for row in rows if row.name == "mae"] == [("weights", "mae"), ("recipe", "mae")]


def test_weights_that_a_recipe_begins_with_have_its_model(tmp_path: Path) -> None:
    (file := tmp_path / "vit.safetensors").touch()
    own = f"mae:model=vit_small_patch16_224,model-kwargs=depth 6,init={file}"
    config = tiny_comparison(tmp_path, recipes=("mae", own), seeds=1)
    evaluated = [
        cell for cell in cells_of(config, entries(config), choose_labels(config.eval), (32,)) if cell.kind == "weights"
    ]
    assert [cell.name for cell in evaluated] == [str(file)]
    for taken in (evaluated[0].evaluate, evaluated[0].finetune):
        assert (taken.model, taken.model_kwargs) == ("vit_small_patch16_224", {"depth": 6})


def test_every_architecture_has_its_baseline(tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path, recipes=("mae", "pr-mim", "mae:depth=1"), seeds=1)
    found = cells_of(config, entries(config), choose_labels(config.eval), (32,))
    names = [cell.name for cell in found if cell.kind == "untrained"]
    assert len(names) == 2 and names[1] == f"{names[0]}, --depth 1"
    assert names[0].startswith("random initialisation, vit_tiny_patch16_224, patch_size=8, ")
    for kind, depths in {"untrained": [None, 1], "recipe": [None, None, 1]}.items():
        assert [cell.finetune.depth for cell in found if cell.kind == kind] == depths
        assert [cell.evaluate.depth for cell in found if cell.kind == kind] == depths
    untrained = [row.architecture for row in rows_of(found) if row.kind == "untrained"]
    assert [row.architecture for row in rows_of(found) if row.kind == "recipe"] == [
        untrained[place] for place in (0, 0, 1)
    ]


def test_screening_is_a_tenth_one_seed_and_the_first_measure(tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path, measures=("linear", "finetune"))
    for cell in screening_of(config, entries(config), choose_labels(config.eval), (32,)):
        assert cell.pretrain is not None
        assert (cell.pretrain.epochs, cell.seed, cell.measures) == (2, 0, ("linear",))
        assert cell.folder.parent.name == "screen"


@pytest.mark.parametrize(("images", "epochs"), [(9_469, 6), (947, 21), (100, 40)])
def test_epochs_of_fine_tuning_are_a_fifth_of_the_small_recipes(tmp_path: Path, images: int, epochs: int) -> None:
    config = tiny_comparison(tmp_path)
    labels = replace(choose_labels(config.eval), train_labels=[0] * images)
    assert finetune_epochs(config, labels) == epochs
    few = replace(config, label_share=0.1)
    assert finetune_epochs(few, replace(labels, train_labels=[0] * (10 * images))) == epochs  # of those that train
    assert finetune_epochs(replace(config, finetune_epochs=7), labels) == 7


def test_a_cell_is_evaluated_by_all_measures_and_what_is_done_stays(
    tmp_path: Path, tiny: Pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(tiny)
    measures = ("finetune", "attentive", "linear", "knn")
    config = tiny_comparison(tmp_path, measures=measures, finetune_epochs=1, workers=0)
    cell = cell_of(config, "weights", str(run), 1, choose_labels(config.eval), (32,))
    cell.task(0.0)
    assert Cell.read(cell.folder) == cell
    run_cell(cell.folder)
    found = cell.result["accuracies"]
    assert tuple(found) == measures and "training" not in cell.result
    results = json.loads((cell.folder / "finetune" / "results.json").read_text())
    assert found["finetune"]["value"] == results["top1"] and found["finetune"]["images"] == 18
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert {line["what"]: line["value"] for line in lines} == {
        {"linear": "probe"}.get(name, name): found[name]["value"] for name in measures[1:]
    }
    stored = json.loads((cell.folder / "finetune" / "config.json").read_text())
    assert (stored["recipe"], stored["epochs"], stored["seed"], stored["input_size"]) == ("small", 1, 1, [32])

    (cell.folder / "result.json").unlink()  # killed just before the end
    monkeypatch.setattr(cells, "frozen", None)
    monkeypatch.setattr(cells, "finetuned", None)
    run_cell(cell.folder)
    assert cell.result["accuracies"] == found
