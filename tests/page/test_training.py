"""How training went: the summary and the charts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.config import Report
from leanmim.page import report
from leanmim.page.load import AXES, load
from tests.page.pages import FINETUNE, Page, full, lines, make, metric, tuned, validation


def test_charts_overlay_the_runs_and_draw_each_segment(tmp_path: Path) -> None:
    a = make(tmp_path / "a", metrics=lines(metric(5), metric(10)))
    b = make(tmp_path / "b", metrics=lines(*(metric(s, loss_0=3, loss_1=1) for s in (5, 10))))
    page = Page(report(Report(runs=(a, b))))
    assert {title: tags.count("polyline") for title, tags in page.charts.items() if "against" not in title} == {
        "loss": 4, "online kNN accuracy (%)": 0, "learning rate (10⁻³)": 2, "speed (images/s)": 2,
        "memory of process or GPU (GiB)": 2, "waiting for data (% of time)": 2,
    }  # fmt: skip
    assert "no run has --knn-data" in page.text
    heights = [{y for _, y in curve(page, f"b, segment {i}")} for i in (0, 1)]
    assert max(heights[0]) < min(heights[1]) and len(heights[0]) == len(heights[1]) == 1  # 3 stands above 1


def test_the_horizontal_axis_can_be_chosen(tmp_path: Path) -> None:
    """Of 5 steps of 8 images: 40 images in 4 s at 1 GFLOP each, then as many in 1 s."""
    predicted = {f"{kind}_bytes": 2**30 for kind in ("peak", "weight", "gradient", "optimizer", "saved", "transient")}
    cost = json.dumps({"predicted": {**predicted, "train_flops_per_image": 10**9}})
    fast, slow = (metric(step, seconds=seconds, images_per_second=40 / seconds) for step, seconds in ((10, 1), (5, 4)))
    run = make(tmp_path / "run", metrics=lines(slow, fast, {"step": 10, "knn": 0.5}))
    (Path(run) / "cost.json").write_text(cost)
    found = load(Path(run), "run", "red")
    assert [x for x, _ in found.values("loss")] == [1, 2]
    assert [x for x, _ in found.values("loss", "million images")] == pytest.approx([40e-6, 80e-6])
    assert [x for x, _ in found.values("loss", "minutes")] == pytest.approx([4 / 60, 5 / 60])
    assert found.values("knn", "PFLOP") == [(pytest.approx(80e9 / 1e15), 0.5)]
    page = Page(report(Report(runs=(run,))))
    assert {f"loss against {axis}" for axis in AXES[1:]} < page.charts.keys()
    assert page.source.count('type="radio"') == 4 and "speed (images/s) against minutes" not in page.charts


def curve(page: Page, label: str) -> list[tuple[float, float]]:
    """The first line of that name, px from the chart's upper left corner."""
    points, *_ = re.findall(rf'<title>{label}</title><polyline points="([^"]+)"', page.source)  # against epochs
    return [(float(x), float(y)) for x, y in (point.split(",") for point in points.split())]


def test_a_fine_tuning_is_summed_up(tmp_path: Path) -> None:
    page = Page(report(Report(runs=(tuned(tmp_path / "run"),))))
    assert page.row("run", "small") == [
        "run", "small", "128", "3", "3", "2 / 4", "0.2000", "75.0 (30.1 to 95.4)",
        "75", "6.7", "5.00", "0:00:12", "NVIDIA H200", "runs/mae",
    ]  # fmt: skip


def test_before_the_end_the_best_accuracy_so_far_stands_in_the_summary(tmp_path: Path) -> None:
    shaky = lines(metric(5), validation(5, 0.5), metric(10), validation(10, 0.25))
    page = Page(report(Report(runs=(tuned(tmp_path / "run", metrics=shaky, results=""),))))
    assert page.row("run", "small")[7] == "50.0 (40.0 to 60.0), best so far"
    begun = Page(report(Report(runs=(tuned(tmp_path / "new", metrics="", results="", labels="", environment=""),))))
    assert begun.row("new", "small")[3:] == ["not yet"] * 10 + ["runs/mae"]


def test_pre_training_and_fine_tuning_have_charts_of_their_own(tmp_path: Path) -> None:
    runs = (full(tmp_path / "a"), tuned(tmp_path / "b"), tuned(tmp_path / "c", replace(FINETUNE, smoothing=0.0)))
    page = Page(report(Report(runs=runs)))
    counts = {title: tags.count("polyline") for title, tags in page.charts.items()}
    assert counts["loss"] == counts["online kNN accuracy (%)"] == 1
    assert counts["validation top-1 accuracy (%)"] == counts["validation loss"] == counts["training loss"] == 2
    assert page.text.count("Pre-training") == page.text.count("Fine-tuning") == 3  # summary, training, configuration
    assert "The runs differ in smoothing: compare their accuracies, not their training losses" in page.text
    alone = Page(report(Report(runs=runs[1:])))
    assert "online kNN accuracy (%)" not in alone.charts and "Fine-tuning" not in alone.text
