"""What evaluators found: the table, and accuracy against depth."""

import re
from pathlib import Path

import pytest

from leanmim.config import Report
from leanmim.page import report
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


def test_measures_of_any_name_have_a_row_each_with_their_numbers_in_order(tmp_path: Path) -> None:
    found = ["few-shot 10", "few-shot 5", "attentive", "linear layer 12", "linear layer 6", "knn", "of my own"]
    shared = {"name": "pretrained", "data": "labelled", "options": {"run": "r", "batch_size": 4, "cache": True, "k": 3}}
    more = {"few-shot 5": {"interval": [0.4, 0.6], "deviation": 0.025}}
    values = [{"what": what, "value": 0.5, **shared, **more.get(what, {})} for what in found]
    page = Page(report(Report(runs=(make(tmp_path / "run", evaluations=lines(*values)),))))
    rows = [cells for _, cells in page.rows if cells[1] in found]
    assert [cells[1] for cells in rows] == [
        "attentive", "few-shot 5", "few-shot 10", "knn", "linear layer 6", "linear layer 12", "of my own",
    ]  # fmt: skip
    assert {cells[-1] for cells in rows} == {"k 3"}
    assert page.row("run", "few-shot 5")[2] == "50.0 ± 2.5 (40.0 to 60.0)"
    assert "standard deviation over repeated draws" in page.text


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
