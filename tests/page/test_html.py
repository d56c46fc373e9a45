"""Escaping."""

import json
from dataclasses import replace
from pathlib import Path

from leanmim.config import Report
from leanmim.page import report
from leanmim.recipes import MAE
from tests.page.pages import Page, lines, make, metric


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
