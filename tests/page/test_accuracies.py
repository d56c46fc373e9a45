"""What evaluators found: the table, and accuracy against depth."""

import re
from pathlib import Path

import pytest

from leanmim.config import Report
from leanmim.page import report
from tests.page.pages import Page, full, lines, make, metric


def test_accuracies_stand_next_to_their_baselines_and_the_newest_counts(tmp_path: Path) -> None:
    page = Page(report(Report(runs=(full(tmp_path / "run"),))))
    assert page.row("measure (%)") == ["measure (%)", "run", "validation images", "data", "options"]
    assert page.row("knn") == ["knn", "87.5random 20.0pixels 12.5", "-", "labelled", "k 20"]
    assert "87.5" in page.row("run", "mae")  # measured after the training


def test_each_run_has_a_column_and_each_measure_a_row(tmp_path: Path) -> None:
    line = {"what": "knn", "name": "pretrained", "data": "labelled", "options": {"k": 20}}
    a, b, c = (
        make(
            tmp_path / name,
            evaluations=lines(*({**line, "value": value, "what": what} for what, value in found.items())),
        )
        for name, found in {"a": {"knn": 0.5, "probe": 0.25}, "b": {"knn": 0.75}, "c": {}}.items()
    )
    page = Page(report(Report(runs=(a, b, c))))
    assert page.row("measure (%)")[:4] == ["measure (%)", "a", "b", "validation images"]
    assert page.row("knn")[:3] == ["knn", "50.0", "75.0"] and page.row("probe")[:3] == ["probe", "25.0", "-"]
    assert 'style="width:75.0%' in page.source and 'data-label="b"' in page.source


def test_accuracies_come_with_their_intervals_and_the_number_of_images(tmp_path: Path) -> None:
    line = {"what": "knn", "data": "labelled", "options": {"k": 20}, "images": 1600, "interval": [0.54, 0.619]}
    run = make(
        tmp_path / "run",
        metrics=lines(metric(5), {"step": 5, "knn": 0.25, "knn_low": 0.0456, "knn_high": 0.699, "knn_images": 4}),
        evaluations=lines({**line, "name": "pretrained", "value": 0.58}, {**line, "name": "pixels", "value": 0.6}),
    )
    page = Page(report(Report(runs=(run,))))
    cells = ["knn", "58.0 (54.0 to 61.9)pixels 60.0 (54.0 to 61.9)", "1,600", "labelled", "k 20"]
    assert page.row("knn") == cells
    assert "58.0 (54.0 to 61.9)" in page.row("run", "mae")
    assert "Wilson's 95 % interval" in page.text
    (Path(run) / "evaluations.jsonl").unlink()
    assert "25.0 (4.6 to 69.9)" in Page(report(Report(runs=(run,)))).row("run", "mae")  # while training


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
    found = {cells[4]: cells[1] for _, cells in page.rows if cells[0] == "probe"}
    assert found == {"epochs 90": "50.0", "epochs 10": "75.0"}


def test_measures_of_any_name_have_a_row_each_with_their_numbers_in_order(tmp_path: Path) -> None:
    found = ["few-shot 10", "few-shot 5", "attentive", "linear layer 12", "linear layer 6", "knn", "of my own"]
    shared = {"name": "pretrained", "data": "labelled", "options": {"run": "r", "batch_size": 4, "cache": True, "k": 3}}
    more = {"few-shot 5": {"interval": [0.4, 0.6], "deviation": 0.025}}
    values = [{"what": what, "value": 0.5, **shared, **more.get(what, {})} for what in found]
    page = Page(report(Report(runs=(make(tmp_path / "run", evaluations=lines(*values)),))))
    rows = [cells for _, cells in page.rows if cells[0] in found]
    assert [cells[0] for cells in rows] == [
        "attentive", "few-shot 5", "few-shot 10", "knn", "linear layer 6", "linear layer 12", "of my own",
    ]  # fmt: skip
    assert {cells[-1] for cells in rows} == {"k 3"}
    assert page.row("few-shot 5")[1] == "50.0 ± 2.5 (40.0 to 60.0)"
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
