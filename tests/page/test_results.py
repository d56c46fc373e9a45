"""What fine-tuned classifiers get right and wrong."""

from pathlib import Path

from leanmim.config import Report
from leanmim.page import report
from tests.page.pages import Page, full, results, tuned


def test_a_classifier_has_its_accuracies_classes_and_pictures(tmp_path: Path) -> None:
    page = Page(report(Report(runs=(tuned(tmp_path / "run"),))))
    assert page.row("run", "75.0 (30.1 to 95.4)")[2:] == [
        "-",
        "83.3",
        "128",
        "4",
        "3",
        "best, epoch 1",
        "labelled, val",
    ]
    assert page.row("ant")[1:] == ["66.7", "3", "bee (1)"]
    assert page.row("bee")[1:] == ["100.0", "1", "-"]
    assert page.row("cat")[1:] == ["-", "0", "-"]
    assert "run: start: runs/mae; 3 of 9 labels are used" in page.text
    assert "Wilson's 95 % interval" in page.text
    assert len(page.links) == 2 and "Confusion matrix" in page.text and "Wrong predictions" in page.text


def test_the_worst_classes_come_first_and_many_can_be_opened(tmp_path: Path) -> None:
    names = [f"class {i:02d}" for i in range(20)]
    diagonal = [[(i + 1) * (i == j) + (20 - i) * (j == (i + 1) % 20) for j in range(20)] for i in range(20)]
    found = results(
        classes=names, per_class=[(i + 1) / 21 for i in range(20)], counts=[21] * 20, confusion=diagonal, top5=0.9,
        top5_interval=[0.8, 0.95],
    )  # fmt: skip
    page = Page(report(Report(runs=(tuned(tmp_path / "run", results=found, mistakes=b""),))))
    shown = [cells for _, cells in page.rows if cells[0].startswith("class ")]
    assert [cells[0] for cells in shown] == names
    assert shown[0][1:] == ["4.8", "21", "class 01 (20)"]
    assert "The other 5 classes" in page.text and "90.0 (80.0 to 95.0)" in page.text
    assert "Wrong predictions" not in page.text  # there are no mistakes


def test_before_the_end_there_are_no_results(tmp_path: Path) -> None:
    page = Page(report(Report(runs=(tuned(tmp_path / "run", results="", confusion=b"", mistakes=b""),))))
    assert "Results of fine-tuning" in page.text and not page.links
    assert page.row("run", "not yet")[1:] == ["not yet"] * 8
    assert "Results of fine-tuning" not in Page(report(Report(runs=(full(tmp_path / "mae"),)))).text
