"""Line charts."""

import re
from pathlib import Path

from leanmim.config import Report
from leanmim.page import report
from leanmim.page.charts import Curve, chart, thin
from tests.page.pages import Page, lines, make, metric


def test_points_stay_inside_the_chart_and_a_single_one_is_drawn(tmp_path: Path) -> None:
    page = Page(report(Report(runs=(make(tmp_path / "run", metrics=lines(metric(5), {"step": 5, "knn": 0.0})),))))
    assert all(tags.count("circle") == 1 for tags in page.charts.values())
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', page.source):
        assert float(x) == 466 and 36 <= float(y) <= 216


def test_long_runs_are_thinned_without_losing_a_spike() -> None:
    points = [(float(i), 0.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    few = thin(points)
    assert len(few) < 1000 and few == sorted(few)
    assert {points[0], points[54_321], points[-1]} <= set(few)


def test_a_pointer_is_told_the_numbers() -> None:
    short = chart("accuracy", [Curve([(1.0, 50.0), (2.5, 60.25)], "red", "a<b")], False, "")
    assert "<title>a&lt;b: 60.25 at epoch 2.5</title>" in short and "hidden" not in short
    long = chart("loss", [Curve([(float(i), float(i)) for i in range(1000)], "red", "run")], False, "", "step")
    assert 20 < long.count('class="hidden"') == long.count(" at step ") <= 60


def test_intervals_are_drawn_inside_the_chart() -> None:
    curve = Curve([(1.0, 50.0), (2.0, 60.0)], "red", "run", intervals=[(1.0, 10.0, 90.0)])
    svg = chart("accuracy", [curve], False, "")
    ((x, low, again, high),) = re.findall(r'<polyline points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"/>', svg)
    assert x == again and 36 <= float(high) < float(low) <= 216
    assert svg.count("<polyline") == 2


def test_the_axis_of_a_constant_has_marks_that_differ() -> None:
    svg = chart("accuracy", [Curve([(1.0, 100.0), (2.0, 100.0)], "red", "run")], False, "")
    marks = re.findall(r'text-anchor="end">([\d.]+)<', svg)
    assert len(set(marks)) == len(marks) > 2
