"""The page: where it is written, what it survives, what it refuses."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from leanmim.config import Report
from leanmim.errors import UserError
from leanmim.page import report
from tests.page.pages import Page, full, make


def test_a_run_is_summed_up_on_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    path = report(Report(runs=(full(tmp_path / "run"),)))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    # (1 % of 40 s + 5 % of 8 s + 10 % of 4 s) / 52 s = 2.3 %
    assert page.row("run", "mae")[2:] == [
        "vit_small_patch16_224", "224", "2 / 4", "1,200", "0.2000", "87.5",
        "50", "2.3", "5.00", "0:00:52", "NVIDIA H200",
    ]  # fmt: skip
    (link,) = page.links
    assert link.startswith("data:image/")
    with Image.open(io.BytesIO(base64.b64decode(link.partition("base64,")[2]))) as picture:
        assert picture.size == (1, 1)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", page.source)
    assert page.row("command")[1] == "leanmim pretrain"
    assert not list(tmp_path.rglob("*.part"))


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = (full(tmp_path / "a" / "run"), full(tmp_path / "b" / "run"))
    page = Page(report(Report(runs=runs)))
    assert page.row(runs[0], "mae") and page.row(runs[1], "mae")


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(UserError, match="is a folder; give the name of a page with --out"):
        report(Report(runs=(run,), out=str(tmp_path)))
    with pytest.raises(UserError, match=r"page\.html' cannot be written: "):
        report(Report(runs=(run,), out=str(tmp_path / "run" / "config.json" / "page.html")))
