"""Escaping."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.config import Report
from leanmim.page import report
from leanmim.recipes import MAE
from tests.page.pages import FINETUNE, PIXEL, Page, lines, make, metric, results, tuned


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
    page = Page(report(Report(runs=(run,))))
    assert "<script" not in page.source
    assert page.text.count(evil) > 15


def test_texts_of_a_fine_tuning_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&')<"
    run = tuned(
        tmp_path / "run",
        replace(FINETUNE, start=evil, data=evil, recipe=evil),
        results=results(classes=[evil] * 3, data=evil, split=evil),
        labels=json.dumps({"classes": [evil], "train": [], "notes": [evil]}),
    )
    page = Page(report(Report(runs=(run,))))
    assert "<script" not in page.source
    assert page.text.count(evil) > 10


def test_names_that_are_no_text_are_written_as_escapes(tmp_path: Path) -> None:
    run = tuned(
        tmp_path / "run",
        results=results(classes=["a\udcff", "b", "c"]),
        labels=json.dumps({"classes": ["a\udcff", "b", "c"], "train": [], "notes": ["of a\udcff"]}),
        skipped=lines({"path": "x\udcfe.png", "reason": "x\udcfe.png is none"}),
    )
    page = Page(report(Report(runs=(run,))))
    assert page.text.count("a\\udcff") >= 2 and page.text.count("x\\udcfe.png") == 2


@pytest.mark.parametrize("png", [b"", b"none", PIXEL[:40]])
def test_a_damaged_picture_does_not_keep_the_page_from_being_written(tmp_path: Path, png: bytes) -> None:
    page = Page(report(Report(runs=(make(tmp_path / "run", reconstructions=png),))))
    assert page.links == ([f"data:image/png;base64,{base64.b64encode(png).decode()}"] if png else [])
