"""What each section of the page shows."""

import json
from dataclasses import replace
from pathlib import Path

from leanmim.config import Report
from leanmim.page import report
from leanmim.recipes import MAE, SIMMIM
from tests.page.pages import FINETUNE, Page, full, tuned


def test_ten_skipped_files_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    text = Page(report(Report(runs=(full(tmp_path / "run"),)))).text
    assert "12bad0.jpg truncated" in text and "bad9.jpg" in text and "bad10.jpg" not in text and "and 2 more" in text


def test_differing_settings_come_first_and_are_marked(tmp_path: Path) -> None:
    runs = (full(tmp_path / "a"), full(tmp_path / "b", replace(SIMMIM, model_kwargs={"depth": 8})))
    page = Page(report(Report(runs=runs, out=str(tmp_path / "new" / "page.html"))))
    settings = page.rows[[cells for _, cells in page.rows].index(["setting", "a", "b"]) + 1 :]
    marked = {cells[0]: cells[1:] for style, cells in settings if style == "differs"}
    assert marked["mask_ratio"] == ["0.75", "0.6"]
    assert marked["model_kwargs"] == ["-", "depth 8"]
    assert "epochs" not in marked
    assert [style for style, _ in settings[: len(marked)]] == ["differs"] * len(marked)
    assert {cells[0] for _, cells in settings} >= set(MAE.to_json())
    assert "The runs differ in recipe, target, loss" in page.text


def test_one_run_has_nothing_marked(tmp_path: Path) -> None:
    page = Page(report(Report(runs=(full(tmp_path / "run"),))))
    assert not any(style == "differs" for style, _ in page.rows)
    assert "The runs differ" not in page.text


def test_the_resolved_recipes_of_fine_tuning_are_compared(tmp_path: Path) -> None:
    runs = (tuned(tmp_path / "a"), tuned(tmp_path / "b", replace(FINETUNE, mixup=0.0)), full(tmp_path / "c"))
    page = Page(report(Report(runs=runs)))
    tables = [i for i, (_, cells) in enumerate(page.rows) if cells[0] == "setting"]
    assert [page.rows[i][1] for i in tables] == [
        ["setting", "a", "b"], ["setting", "c"], ["setting", "a", "b"], ["setting", "a", "b", "c"],
    ]  # fmt: skip
    recipe = {cells[0]: (style, cells[1:]) for style, cells in page.rows[tables[0] + 1 : tables[1]]}
    assert recipe["mixup"] == ("differs", ["0.8", "0"])
    assert recipe["layer_decay"] == ("", ["0.75"]) and "workers" not in recipe and "data" not in recipe


def test_costs_of_a_fine_tuning_are_shown_where_they_are_known(tmp_path: Path) -> None:
    without = Page(report(Report(runs=(tuned(tmp_path / "a"),))))
    assert "Cost, predicted" not in without.text
    predicted = {f"{kind}_bytes": 2**30 for kind in ("peak", "weight", "gradient", "optimizer", "saved", "transient")}
    run = Path(tuned(tmp_path / "b"))
    (run / "cost.json").write_text(json.dumps({"predicted": {**predicted, "train_flops_per_image": 3e9}}))
    assert Page(report(Report(runs=(str(run),)))).row("b", "1.00")[1:3] == ["1.00", "not yet"]
