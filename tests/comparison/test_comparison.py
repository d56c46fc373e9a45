"""Recipes under one budget: the table and what it rests on; stopped, killed and failed comparisons."""

import html
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import pytest
import timm
from safetensors.torch import save_file

import leanmim
from leanmim.cli import main, parse
from leanmim.comparison import compare, processes
from leanmim.comparison.table import Table
from leanmim.config import Compare, Knn
from leanmim.errors import UserError
from leanmim.run import Run
from tests.comparison.fakes import here, made_up, tiny_comparison
from tests.helpers import VIT
from tests.runs import ENVIRONMENT, Refused

EPOCHS = 30  # of one step each


def line(config: Compare) -> list[str]:
    """The command line of a configuration, as far as these tests give one."""
    words = ["compare", "--model-kwargs", *(str(word) for pair in config.model_kwargs.items() for word in pair)]
    for name in (
        "recipes",
        "data",
        "eval",
        "out",
        "budget",
        "seeds",
        "measures",
        "model",
        "input_size",
        "device",
        "jobs",
    ):
        value = getattr(config, name)
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Compare, Table]]:
    """A comparison with real trainings, in this process."""
    config = tiny_comparison(tmp_path_factory.mktemp("compared"), budget=f"{EPOCHS}epochs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "launch", here)
        yield config, compare(config)


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compare with made-up accuracies."""

    def run(accuracy: Any, failing: str = "", **changes: Any) -> Table:
        monkeypatch.setattr(processes, "launch", made_up(accuracy, failing))
        return compare(tiny_comparison(tmp_path, **changes))

    return run


def by_name(table: Table) -> dict[str, Any]:
    return {row.name: row for row in table.rows}


def test_the_table_is_what_the_evaluators_say_of_the_runs(compared: tuple[Compare, Table]) -> None:
    config, table = compared
    rows = by_name(table)
    assert list(rows) == ["random initialisation", "raw pixels", "mae", "pr-mim"]
    found: dict[str, list[float]] = {"pretrained": [], "random": [], "pixels": []}
    for seed in range(2):
        run = str(Path(config.out) / "cells" / f"mae-{seed}" / "pretrain")
        assert Run(Path(run)).stored()["seed"] == seed and Run(Path(run)).stored()["epochs"] == EPOCHS
        for name, accuracy in leanmim.knn(Knn(run=run, data=config.eval, workers=0, device="cpu", baselines=True)):
            found[name].append(float(accuracy))
    for name, kind in (("mae", "pretrained"), ("random initialisation", "random")):
        score = rows[name].scores["knn"]
        assert score.values == tuple(found[kind])
        assert score.value == pytest.approx(np.mean(found[kind]))
        assert score.high - score.value == pytest.approx(np.std(found[kind], ddof=1))
        assert score.images == 18 and rows[name].seeds == 2
    pixels = rows["raw pixels"].scores["knn"]
    assert pixels.values == (found["pixels"][0],) and pixels.low < pixels.value <= pixels.high <= 1


def test_what_a_training_took_is_what_its_run_folder_says(compared: tuple[Compare, Table]) -> None:
    config, table = compared
    row = by_name(table)["mae"]
    runs = [Path(config.out) / "cells" / f"mae-{seed}" / "pretrain" for seed in range(2)]
    costs = [json.loads((run / "cost.json").read_text()) for run in runs]
    assert row.epochs == EPOCHS
    assert row.flops == costs[0]["predicted"]["train_flops_per_image"] * EPOCHS * 24  # images
    assert row.memory_bytes == costs[0]["predicted"]["peak_bytes"]
    assert row.measured_bytes == np.mean([cost["measured"]["peak_bytes"] for cost in costs])
    seconds = [
        sum(json.loads(line).get("seconds", 0) for line in (run / "metrics.jsonl").read_text().splitlines())
        for run in runs
    ]
    assert row.seconds == pytest.approx(np.mean(seconds))


def test_a_finished_comparison_trains_nothing_again(compared: tuple[Compare, Table]) -> None:
    config, table = compared
    written = {path: path.stat().st_mtime_ns for path in Path(config.out, "cells").rglob("*.pt")}
    assert compare(config) == table
    assert written == {path: path.stat().st_mtime_ns for path in Path(config.out, "cells").rglob("*.pt")}
    folder = Path(config.out)
    assert (folder / "table.md").read_text() == f"{table}\n"
    assert json.loads((folder / "table.json").read_text())["findings"] == table.findings()
    assert len((folder / "table.csv").read_text().splitlines()) == 1 + 2 * 4


def test_every_depth_of_a_run_in_segments_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "launch", here)
    recipes = ("mae:batch-size=24", "mae:batch-size=24,segments=2")
    config = tiny_comparison(
        tmp_path, recipes=recipes, seeds=1, depths=True, measures=("finetune", "knn"), finetune_epochs=1
    )
    rows = by_name(compare(config))
    assert list(rows) == ["random initialisation", "raw pixels", "mae", "mae segments=2", "mae segments=2, first 1"]
    shallow = rows["mae segments=2, first 1"]
    assert shallow.kind == "depth" and shallow.seconds is None
    cell = Path(config.out) / "cells" / "mae-segments-2-0"
    ((_, own),) = leanmim.knn(
        Knn(run=str(cell / "pretrain"), data=config.eval, depth=1, workers=0, device="cpu", k=18, baselines=False)
    )
    assert shallow.scores["knn"].values == (float(own),)
    tuned = Run(cell / "depth1" / "finetune")
    assert tuned.stored()["depth"] == 1
    assert shallow.scores["finetune"].value == json.loads((tuned.folder / "results.json").read_text())["top1"]
    page = (Path(config.out) / "page.html").read_text()
    assert page.count("--depth 1") == 2 and "mae segments=2, first 1" in page


def test_killed_in_the_middle_of_a_training_it_goes_on_to_the_same_table(
    compared: tuple[Compare, Table], tmp_path: Path
) -> None:
    config, table = compared
    copytree(config.out, tmp_path / "killed")
    cell = tmp_path / "killed" / "cells" / "mae-1"
    rmtree(cell)
    config = replace(config, out=str(tmp_path / "killed"), jobs=os.cpu_count() or 1)
    parent = subprocess.Popen(
        [sys.executable, "-m", "leanmim", *line(config)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    run = Run(cell / "pretrain")
    while not run.last.exists():
        assert parent.poll() is None, parent.stderr and parent.stderr.read()
        time.sleep(0.02)
    parent.kill()
    parent.communicate()
    while "stopped by SIGTERM after step" not in (cell / "log.txt").read_text():
        time.sleep(0.02)
    assert 0 < run.read()["step"] < EPOCHS
    assert not (cell / "result.json").exists()
    found = compare(config)
    assert [row.scores for row in found.rows] == [row.scores for row in table.rows]
    assert [row.flops for row in found.rows] == [row.flops for row in table.rows]
    assert run.read()["step"] == EPOCHS


def test_a_stop_reaches_what_trains_and_the_same_command_goes_on(
    faked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[str] = []

    class Endless:
        def __init__(self, task: Any, place: Any) -> None:
            self.name = task.name

        def poll(self) -> None:
            raise KeyboardInterrupt  # not by a signal, which a shell's background jobs ignore

        def stop(self) -> None:
            stopped.append(self.name)

        def wait(self) -> int:
            return 143

    monkeypatch.setattr(processes, "launch", Endless)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny_comparison(tmp_path, jobs=2))
    assert stopped == ["random initialisation, seed 0", "raw pixels, seed 0"]
    assert [row.seeds for row in faked(lambda cell: 0.5, jobs=3).rows] == [2, 1, 2, 2]


def test_a_cell_that_fails_is_named_with_its_log_and_the_others_go_on(
    faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "out" / "cells" / "mae-1" / "log.txt"
    with pytest.raises(UserError) as error:
        faked(lambda cell: 0.5, failing="mae")
    assert str(error.value).startswith("2 of 7 cells failed:\n  mae, seed 0 failed (no room); its log is ")
    assert f"mae, seed 1 failed (no room); its log is {log}" in str(error.value)
    assert "mae, seed 1 failed" in capsys.readouterr().err
    assert "pr-mim" in (tmp_path / "out" / "page.html").read_text()
    assert by_name(faked(lambda cell: 0.5))["mae"].seeds == 2  # the same command tries them again


def test_screening_drops_the_hopeless(faked: Any, tmp_path: Path) -> None:
    asked: list[tuple[str, int, tuple[str, ...]]] = []

    def accuracy(cell: dict[str, Any]) -> float:
        if cell["pretrain"]:
            asked.append((cell["name"], cell["pretrain"]["epochs"], tuple(cell["measures"])))
        return {"mae": 0.5, "pr-mim": 0.45, "fastmim": 0.43}.get(cell["name"], 0.3)  # of ± 0.03 each

    table = faked(accuracy, recipes=("mae", "pr-mim", "fastmim"), screen=True, budget="30epochs", seeds=1)
    screened, whole = asked[:3], [item for item in asked if item[1] == 30]
    assert screened == [(name, 3, ("knn",)) for name in ("mae", "pr-mim", "fastmim")]
    assert {name for name, *_ in whole} == {"mae", "pr-mim", "random initialisation", "raw pixels"}
    row = by_name(table)["fastmim"]
    assert row.dropped and row.seeds == 0 and row.screened.value == 0.43
    assert not by_name(table)["pr-mim"].dropped
    page = (tmp_path / "out" / "page.html").read_text()
    assert "the 95 % interval (kNN) lay below that of the best for fastmim: they went no further" in page
    assert "This took 3.0 min of training, which is not in the table." in page
    assert "43.0 (40.0 to 46.0), dropped" in page


def test_screening_halves_if_it_is_asked_to(faked: Any) -> None:
    accuracies = {"mae": 0.5, "pr-mim": 0.48, "fastmim": 0.49, "simmim mask-unit=8": 0.3}
    table = faked(
        lambda cell: accuracies.get(cell["name"], 0.3),
        recipes=("mae", "pr-mim", "fastmim", "simmim:mask-unit=8"), screen=True, screen_share=0.4, budget="30epochs", seeds=1,
    )  # fmt: skip
    assert {row.name for row in table.rows if row.dropped} == {"pr-mim", "simmim mask-unit=8"}
    text = str(table)
    assert "lay below that of the best for simmim mask-unit=8: they went no further" in text
    assert "By --screen-share pr-mim went no further either" in text


def test_weights_that_a_recipe_begins_with_are_its_baseline(faked: Any, tmp_path: Path) -> None:
    name, arguments = VIT
    file = tmp_path / "vit.safetensors"
    save_file(timm.create_model(name, num_classes=0, img_size=32, **arguments).state_dict(), file)
    accuracies = {str(file): 0.7, f"mae init={file}": 0.6, "mae": 0.5}

    def compared(*recipes: str) -> Table:
        return faked(
            lambda cell: accuracies.get(cell["name"], 0.3),
            recipes=recipes, measures=("knn",), seeds=1, out=str(tmp_path / str(len(recipes))),
        )  # fmt: skip

    table = compared("mae:batch-size=24", f"mae:batch-size=24,init={file}")
    begun = by_name(table)[f"mae init={file}"]
    assert [row.name for row in table.baselines(begun, "knn")] == ["random initialisation", str(file), "raw pixels"]
    assert [row.name for row in table.baselines(by_name(table)["mae"], "knn")] == [
        "random initialisation",
        "raw pixels",
    ]
    assert table.findings()[0].startswith("Pre-training helps: kNN 50.0 (47.0 to 53.0) % (mae) against")
    alone = compared(f"mae:batch-size=24,init={file}")
    assert alone.findings()[0].startswith("Pre-training does not help on these data: kNN 60.0 (57.0 to 63.0) % (mae")


def test_a_recipe_that_cannot_be_screened_does_not_hold_up_the_others(faked: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 5 cells failed:\n  pr-mim, seed 0 failed \(no room\)"):
        faked(lambda cell: 0.5, failing="pr-mim", screen=True, budget="30epochs", seeds=1)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["name"] for row in table["rows"] if row["seeds"]] == ["random initialisation", "raw pixels", "mae"]
    assert "Failed: pr-mim, seed 0 (no room)" in table["findings"][-1]
    with pytest.raises(UserError, match="no recipe could be screened:\n  mae, seed 0 failed"):
        faked(
            lambda cell: 0.5,
            failing="mae",
            recipes=("mae",),
            screen=True,
            budget="30epochs",
            seeds=1,
            out=str(tmp_path / "b"),
        )


def test_a_table_is_of_one_set_of_images(faked: Any, tmp_path: Path) -> None:
    faked(lambda cell: 0.5, seeds=1)
    copytree(tmp_path / "tiles", tmp_path / "moved")
    moved = dict(eval=str(tmp_path / "moved"), data=str(tmp_path / "moved" / "train"))
    assert faked(lambda cell: 0.5, seeds=1, **moved).rows  # the same images elsewhere
    next((tmp_path / "moved" / "val").rglob("*.png")).unlink()
    with pytest.raises(UserError, match="was begun with other images to evaluate on; give the same ones"):
        faked(lambda cell: 0.5, seeds=1, **moved)
    next((tmp_path / "moved" / "train").rglob("*.png")).unlink()
    with pytest.raises(UserError, match="other images to pre-train on and images to evaluate on"):
        faked(lambda cell: 0.5, seeds=1, **moved)


def test_the_page_holds_the_command_of_the_comparison(faked: Any, tmp_path: Path) -> None:
    recipes = ("mae:batch-size=24,mask-ratio=0.8", "bim:segments=2,mask-ratio=0.72 0.78")
    faked(lambda cell: 0.5, recipes=recipes)
    page = html.unescape((tmp_path / "out" / "page.html").read_text())
    (found,) = re.findall(r"leanmim compare [^<]*", page)
    assert parse(shlex.split(found)[1:]) == ("compare", tiny_comparison(tmp_path, recipes=recipes))


def test_other_options_are_another_comparison(faked: Any, tmp_path: Path) -> None:
    faked(lambda cell: 0.5, seeds=1)
    with pytest.raises(UserError, match=r"holds another comparison:\n  seeds: 1 there, 2 now"):
        faked(lambda cell: 0.5)
    assert faked(lambda cell: 0.5, seeds=1, jobs=1).rows
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not a comparison"):
        faked(lambda cell: 0.5, out=str(tmp_path / "other"))


def test_what_is_wrong_is_told_before_anything_is_written(refused: Refused, tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path)
    line = [
        "compare",
        "--data",
        config.data,
        "--eval",
        config.eval,
        "--out",
        config.out,
        "--model",
        config.model,
        "--input-size",
        "32",
    ]
    assert "--budget 'much' is no budget" in refused([*line, "--recipes", "mae", "--budget", "much"])
    assert "there is no recipe 'mea'" in refused([*line, "--recipes", "mea"])
    assert "names mae twice" in refused([*line, "--recipes", "mae", "mae"])
    assert "sets seed for all recipes" in refused([*line, "--recipes", "mae:seed=3"])
    assert "is neither a run folder" in refused([*line, "--recipes", "mae", "--weights", str(tmp_path)])
    assert "mae, evaluated at 20 px (--eval-size): " in refused([*line, "--recipes", "mae", "--eval-size", "20"])
    assert "--screen-share is for --screen" in refused([*line, "--recipes", "mae", "--screen-share", "0.5"])
    assert "--weights names a.b and a.b" in refused([*line, "--recipes", "mae", "--weights", "a.b", "a.b"])
    assert not Path(config.out).exists()


def test_the_command_prints_the_table(faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = faked(lambda cell: 0.5, seeds=1)
    main(line(tiny_comparison(tmp_path, seeds=1)))
    assert capsys.readouterr().out == f"{table}\n"
