"""The page of a comparison."""

from dataclasses import replace
from pathlib import Path

from leanmim.comparison.cells import cells_of
from leanmim.comparison.page import page_of
from leanmim.comparison.table import Row
from leanmim.data.labels import choose_labels
from tests.comparison.fakes import tiny_comparison
from tests.comparison.test_cells import entries
from tests.comparison.test_table import row, table
from tests.page.pages import Page


def page(tmp_path: Path, *rows: Row) -> Page:
    config = tiny_comparison(tmp_path, seeds=1)
    planned = [replace(entry, speeds=(10.0, 12.0, 40.0)) for entry in entries(config)]
    cells = cells_of(config, planned, choose_labels(config.eval), (32,))
    file = tmp_path / "page.html"
    file.write_text(page_of(table(*rows), planned, cells, {"device": "cpu"}), encoding="utf-8")
    return Page(file)


def test_numbers_charts_and_commands(tmp_path: Path) -> None:
    found = page(
        tmp_path, row("mae", 0.5, flops=2e12), row("pr-mim", 0.45), row("random initialisation", 0.3, "untrained"),
        row("<vit>", 0.9, "weights"),
    )  # fmt: skip
    assert found.row("mae", "50.0 ± 1.0") and found.row("<vit>", "90.0 ± 1.0")
    assert found.row("mae", "8", "10.0", "10.0", "2", "1,024", "1,024")
    assert found.row("mae", "32", "20", "24", "0.48", "12.0 (10.0 to 40.0)", "40 s")
    assert not found.links and "<script" not in found.source and "http" not in found.source
    assert "leanmim pretrain mae --data " in found.text and "leanmim evaluate " in found.text
    assert list(found.charts) == [
        f"kNN (%) against {what}" for what in ("training time", "training FLOPs", "predicted peak memory")
    ]
    for chart in found.charts.values():
        assert chart.count("circle") == 2 + 2  # two recipes, two ends of the baseline; given weights are not drawn


def test_that_pretraining_does_not_help_stands_out(tmp_path: Path) -> None:
    found = page(tmp_path, row("mae", 0.29), row("random initialisation", 0.30, "untrained"))
    assert (
        "<strong>Pre-training does not help on these data:</strong> kNN 29.0 ± 1.0 % (mae) against 30.0" in found.source
    )


def test_before_the_first_cell_is_finished(tmp_path: Path) -> None:
    found = page(tmp_path, Row("recipe", "mae", 0, {}))
    assert found.text.count("not yet") >= 3 and not found.charts
    assert "0 of 4 cells are finished" in found.text
