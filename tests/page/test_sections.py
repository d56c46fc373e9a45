"""What each section of the page shows."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.config import Report
from leanmim.page import report
from leanmim.recipes import MAE, SIMMIM
from tests.page.pages import Page, full, lines, make, metric


def test_accuracies_stand_next_to_their_baselines_and_the_newest_counts(tmp_path: Path) -> None:
    page = Page(report(Report(runs=(full(tmp_path / "run"),))))
    assert page.row("run", "measure") == [
        "run",
        "measure",
        "pretrained (%)",
        "random (%)",
        "pixels (%)",
        "validation images",
        "data",
        "options",
    ]
    assert page.row("run", "knn") == ["run", "knn", "87.5", "20.0", "12.5", "-", "labelled", "k 20"]


def test_accuracies_come_with_their_intervals_and_the_number_of_images(tmp_path: Path) -> None:
    line = {"what": "knn", "data": "labelled", "options": {"k": 20}, "images": 1600, "interval": [0.54, 0.619]}
    run = make(
        tmp_path / "run",
        metrics=lines(metric(5), {"step": 5, "knn": 0.25, "knn_low": 0.0456, "knn_high": 0.699, "knn_images": 4}),
        evaluations=lines({**line, "name": "pretrained", "value": 0.58}, {**line, "name": "pixels", "value": 0.6}),
    )
    page = Page(report(Report(runs=(run,))))
    cells = ["run", "knn", "58.0 (54.0 to 61.9)", "60.0 (54.0 to 61.9)", "1,600", "labelled", "k 20"]
    assert page.row("run", "knn") == cells
    assert "25.0 (4.6 to 69.9)" in page.row("run", "mae")
    assert "Wilson's 95 % interval" in page.text


def test_options_on_which_no_result_depends_make_no_row_of_their_own(tmp_path: Path) -> None:
    probe = {"what": "probe", "name": "pretrained", "data": "labelled"}
    run = make(
        tmp_path / "run",
        evaluations=lines(
            {**probe, "value": 0.25, "options": {"epochs": 90, "log_every": 10, "overwrite": False, "device": "cpu"}},
            {**probe, "value": 0.5, "options": {"epochs": 90, "log_every": 1, "overwrite": True, "device": "cuda"}},
            {**probe, "value": 0.75, "options": {"epochs": 10, "log_every": 10, "overwrite": False, "device": "cpu"}},
        ),
    )
    page = Page(report(Report(runs=(run,))))
    found = {cells[5]: cells[2] for _, cells in page.rows if cells[:2] == ["run", "probe"]}
    assert found == {"epochs 90": "50.0", "epochs 10": "75.0"}


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


def test_charts_overlay_the_runs_and_draw_each_segment(tmp_path: Path) -> None:
    a = make(tmp_path / "a", metrics=lines(metric(5), metric(10)))
    b = make(tmp_path / "b", metrics=lines(*(metric(s, loss_0=3, loss_1=1) for s in (5, 10))))
    page = Page(report(Report(runs=(a, b))))
    assert {title: tags.count("polyline") for title, tags in page.charts.items()} == {
        "loss": 4, "online kNN accuracy (%)": 0, "learning rate (10⁻³)": 2, "speed (images/s)": 2,
        "peak memory (GiB)": 2, "waiting for data (% of time)": 2,
    }  # fmt: skip
    assert "no run has --knn-data" in page.text
    heights = [{y for _, y in curve(page, f"b, segment {i}")} for i in (0, 1)]
    assert max(heights[0]) < min(heights[1]) and len(heights[0]) == len(heights[1]) == 1  # 3 stands above 1


def curve(page: Page, label: str) -> list[tuple[float, float]]:
    """The only line of that name, px from the chart's upper left corner."""
    (points,) = re.findall(rf'<title>{label}</title><polyline points="([^"]+)"', page.source)
    return [(float(x), float(y)) for x, y in (point.split(",") for point in points.split())]


def test_depths_stand_where_their_parameters_and_latency_are(tmp_path: Path) -> None:
    ends = [(1, 1e6, 4.0, 0.1), (2, 4e6, 5.0, 0.3)]  # depth, parameters, ms, accuracy
    folder = make(tmp_path / "run", evaluations=lines(*(
        {"what": "knn", "name": "pretrained", "value": value, "data": "labelled", "options": {"depth": depth},
         "depth": depth, "parameters": parameters, "latency_ms": latency, "step": 9, "device": "cpu"}
        for depth, parameters, latency, value in ends
    )))  # fmt: skip
    page = Page(report(Report(runs=(folder,))))
    for name, share in (("depth", 1 / 2), ("M parameters", 1 / 4), ("latency, ms an image", 4 / 5)):
        (svg,) = re.findall(rf'aria-label="kNN \(%\) against {name}">(.*?)</svg>', page.source)
        (points,) = re.findall(r'<polyline points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', svg)
        x, y, last, high = map(float, points)
        left = min(float(start) for start in re.findall(r'd="M([\d.]+) ', svg))
        assert (x - left) / (last - left) == pytest.approx(share, abs=0.01) and y > high
        assert ">10</text>" in svg and ">30</text>" in svg  # per cent
