"""Run folders that are damaged, incomplete, or none."""

from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.config import Report
from leanmim.errors import UserError
from leanmim.page import report
from leanmim.recipes import MAE
from tests.page.pages import Page, lines, make, metric


def test_a_killed_run_is_shown_up_to_its_last_whole_line(tmp_path: Path) -> None:
    cut = lines(metric(5), metric(10))[:-30]
    config = replace(MAE, epochs=800)
    run = make(tmp_path / "run", config, metrics=cut, evaluations='{"what": "kn', skipped='{"pa', environment='{"dev')
    page = Page(report(Report(runs=(run,))))
    assert page.row("run", "mae")[4:7] == ["1 / 800", "400", "0.4000"]


def test_a_run_that_has_just_begun_says_not_yet(tmp_path: Path) -> None:
    page = Page(report(Report(runs=(make(tmp_path / "run"),))))
    assert page.row("run", "mae")[4:] == ["not yet"] * 9
    assert "not yet: `leanmim evaluate`" in page.text
    assert not page.links


def test_what_is_not_a_run_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(UserError, match=r"photos' is not a run folder of `leanmim pretrain`"):
        report(Report(runs=(run, str(tmp_path / "photos"))))
    with pytest.raises(UserError, match=r"^give the run folder of .*: leanmim report run$"):
        report(Report(runs=()))
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data": "", "out": "", "colour": "red"}'])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    run = make(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"(?s)run/config.json' cannot be read .* put back"):
        report(Report(runs=(run,)))
