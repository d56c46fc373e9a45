"""The page about runs: what it shows, what it survives, what it refuses."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from leanmim.config import Pretrain, Report
from leanmim.errors import UserError
from leanmim.recipes import MAE, SIMMIM
from leanmim.report import report, thin

VOID = {"meta", "img", "br"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Text by table row, chart elements by chart title; asserts that every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.links: list[str] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.charts: dict[str, list[str]] = {}
        self.text = ""
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((values.get("class") or "", []))
        elif tag in ("th", "td"):
            self.rows[-1][1].append("")
        elif tag == "svg":
            self.charts[values["aria-label"] or ""] = []
        elif "svg" in self.open:
            self.charts[list(self.charts)[-1]].append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and {"th", "td"} & set(self.open):
            self.rows[-1][1][-1] += data

    def row(self, *start: str) -> list[str]:
        """The only row whose first cells are these."""
        (found,) = [cells for _, cells in self.rows if cells[: len(start)] == list(start)]
        return found


def lines(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def metric(step: int, **more: float) -> dict[str, float]:
    """A line of metrics.jsonl; 5 steps are an epoch of 20 images."""
    speed, wait, memory = 10.0 * step, 0.01 * step, step * 2**29
    values = {"loss": 2 / step, "lr": 1e-4, "images_per_second": speed, "data_wait": wait, "memory_bytes": memory}
    return {"step": step, "epoch": step / 5, **values, "seconds": 400 / speed, **more}


def make(folder: Path, config: Pretrain = MAE, **files: str | bytes) -> str:
    """A run folder; the suffix of a file follows from its name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    for name, content in files.items():
        suffix = {"environment": ".json", "reconstructions": ".png"}.get(name, ".jsonl")
        (folder / f"{name}{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def full(folder: Path, config: Pretrain = MAE) -> str:
    """A run that has everything."""
    return make(
        folder,
        replace(config, knn_data="labelled", epochs=4),
        environment=json.dumps({"device": "NVIDIA H200", "command": ["leanmim", "pretrain"]}),
        metrics=lines(metric(1), metric(5), {"step": 5, "knn": 0.25}, metric(10), {"step": 10, "knn": 0.5}),
        evaluations=lines(
            *(
                {"what": "knn", "name": name, "value": value, "data": "labelled", "options": {"k": 20, "run": "r"}}
                for name, value in (("pretrained", 0.1), ("random", 0.2), ("pixels", 0.125), ("pretrained", 0.875))
            )
        ),
        skipped=lines(*({"path": f"bad{i}.jpg", "reason": "truncated"} for i in range(12))),
        reconstructions=PIXEL,
    )


def test_a_run_is_summed_up_on_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    path = report(Report((full(tmp_path / "run"),)))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    # (1 % of 40 s + 5 % of 8 s + 10 % of 4 s) / 52 s = 2.3 %
    assert page.row("run", "mae")[2:] == [
        "vit_small_patch16_224", "224", "2 / 4", "1,200", "0.2000", "50.0",
        "50", "2.3", "5.00", "0:00:52", "NVIDIA H200",
    ]  # fmt: skip
    assert page.links == ["data:image/png;base64," + base64.b64encode(PIXEL).decode()]
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", page.source)
    assert page.row("command")[1] == "leanmim pretrain"
    assert not list(tmp_path.rglob("*.part"))


def test_accuracies_stand_next_to_their_baselines_and_the_newest_counts(tmp_path: Path) -> None:
    page = Page(report(Report((full(tmp_path / "run"),))))
    assert page.row("run", "measure") == [
        "run",
        "measure",
        "pretrained (%)",
        "random (%)",
        "pixels (%)",
        "data",
        "options",
    ]
    assert page.row("run", "knn") == ["run", "knn", "87.5", "20.0", "12.5", "labelled", "k 20"]


def test_ten_skipped_files_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    text = Page(report(Report((full(tmp_path / "run"),)))).text
    assert "12bad0.jpg truncated" in text and "bad9.jpg" in text and "bad10.jpg" not in text and "and 2 more" in text


def test_differing_settings_come_first_and_are_marked(tmp_path: Path) -> None:
    runs = (full(tmp_path / "a"), full(tmp_path / "b", replace(SIMMIM, model_kwargs={"depth": 8})))
    page = Page(report(Report(runs, out=str(tmp_path / "new" / "page.html"))))
    settings = page.rows[[cells for _, cells in page.rows].index(["setting", "a", "b"]) + 1 :]
    marked = {cells[0]: cells[1:] for style, cells in settings if style == "differs"}
    assert marked["mask_ratio"] == ["0.75", "0.6"]
    assert marked["model_kwargs"] == ["-", "depth 8"]
    assert "epochs" not in marked
    assert [style for style, _ in settings[: len(marked)]] == ["differs"] * len(marked)
    assert {cells[0] for _, cells in settings} >= set(MAE.to_json())
    assert "The runs differ in recipe, target, loss" in page.text


def test_one_run_has_nothing_marked(tmp_path: Path) -> None:
    page = Page(report(Report((full(tmp_path / "run"),))))
    assert not any(style == "differs" for style, _ in page.rows)
    assert "The runs differ" not in page.text


def test_charts_overlay_the_runs_and_draw_each_segment(tmp_path: Path) -> None:
    a = make(tmp_path / "a", metrics=lines(metric(5), metric(10)))
    b = make(tmp_path / "b", metrics=lines(*(metric(s, loss_0=3, loss_1=1) for s in (5, 10))))
    page = Page(report(Report((a, b))))
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
    page = Page(report(Report((folder,))))
    for name, share in (("depth", 1 / 2), ("M parameters", 1 / 4), ("latency, ms an image", 4 / 5)):
        (svg,) = re.findall(rf'aria-label="kNN \(%\) against {name}">(.*?)</svg>', page.source)
        (points,) = re.findall(r'<polyline points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', svg)
        x, y, last, high = map(float, points)
        left = min(float(start) for start in re.findall(r'd="M([\d.]+) ', svg))
        assert (x - left) / (last - left) == pytest.approx(share, abs=0.01) and y > high
        assert ">10</text>" in svg and ">30</text>" in svg  # per cent


def test_points_stay_inside_the_chart_and_a_single_one_is_drawn(tmp_path: Path) -> None:
    page = Page(report(Report((make(tmp_path / "run", metrics=lines(metric(5), {"step": 5, "knn": 0.0})),))))
    assert all(tags.count("circle") == 1 for tags in page.charts.values())
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', page.source):
        assert float(x) == 466 and 36 <= float(y) <= 216


def test_a_killed_run_is_shown_up_to_its_last_whole_line(tmp_path: Path) -> None:
    cut = lines(metric(5), metric(10))[:-30]
    run = make(tmp_path / "run", metrics=cut, evaluations='{"what": "kn', skipped='{"pa', environment='{"dev')
    page = Page(report(Report((run,))))
    assert page.row("run", "mae")[4:7] == ["1 / 800", "400", "0.4000"]


def test_a_run_that_has_just_begun_says_not_yet(tmp_path: Path) -> None:
    page = Page(report(Report((make(tmp_path / "run"),))))
    assert page.row("run", "mae")[4:] == ["not yet"] * 9
    assert "not yet: `leanmim knn`" in page.text
    assert not page.links


def test_texts_of_others_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&')<"
    run = make(
        tmp_path / evil,
        replace(MAE, data=evil, model=evil, model_kwargs={evil: evil}),
        environment=json.dumps({evil: evil, "device": evil}),
        metrics=lines(metric(5)),
        evaluations=lines({"what": evil, "name": evil, "value": 1.0, "data": evil, "options": {evil: evil}}),
        skipped=lines({"path": evil, "reason": evil}),
    )
    page = Page(report(Report((run,))))
    assert "<script" not in page.source
    assert page.text.count(evil) > 15


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = (full(tmp_path / "a" / "run"), full(tmp_path / "b" / "run"))
    page = Page(report(Report(runs)))
    assert page.row(runs[0], "mae") and page.row(runs[1], "mae")


def test_long_runs_are_thinned_without_losing_a_spike() -> None:
    points = [(float(i), 0.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    few = thin(points)
    assert len(few) < 1000 and few == sorted(few)
    assert {points[0], points[54_321], points[-1]} <= set(few)


def test_what_is_not_a_run_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(UserError, match=r"photos' is not a run folder of `leanmim pretrain`"):
        report(Report((run, str(tmp_path / "photos"))))
    with pytest.raises(UserError, match="--runs needs"):
        report(Report(()))
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data": "", "out": "", "colour": "red"}'])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    run = make(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"(?s)run/config.json' cannot be read .* put back"):
        report(Report((run,)))


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(UserError, match="is a folder; give the name of a page with --out"):
        report(Report((run,), out=str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot be written .*; choose another --out"):
        report(Report((run,), out=str(tmp_path / "run" / "config.json" / "page.html")))
