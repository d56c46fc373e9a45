"""The demo's crops; what it trains is what its report and its picture show."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import leanmim
from leanmim.config import Pretrain
from tests.helpers import PHOTOS, fake_run

DEMO = PHOTOS.parent / "demo.py"


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return runpy.run_path(str(DEMO))


def test_crops_for_training_and_validation_do_not_overlap(demo: dict[str, Any]) -> None:
    photo = Image.new("RGB", (60, 40))
    photo.paste("white", (42, 0, 60, 40))  # from 70 % of the width on
    for share in (1, 0.75, 0.25):
        crops = list(demo["squares"](photo, 0, 42, share, 1 / 8))
        assert crops and all(crop.width == crop.height and crop.getextrema() == ((0, 0),) * 3 for crop in crops)
    crops = list(demo["squares"](photo, 42, 60, 0.25, 1 / 8))
    assert crops and all(crop.getextrema() == ((255, 255),) * 3 for crop in crops)


def test_every_photo_is_cut_and_the_photos_shown_are_there(demo: dict[str, Any], tmp_path: Path) -> None:
    demo["cut"](tmp_path / "crops", tmp_path / "labelled")
    names = {path.stem for path in PHOTOS.glob("*.jpg")}
    crops = [path.stem.rpartition("-")[0] for path in (tmp_path / "crops").iterdir()]
    assert set(crops) == names and len(crops) == 140
    for part in ("train", "val"):
        assert {path.parent.name for path in (tmp_path / "labelled" / part).glob("*/*.png")} == names
    assert len(set(demo["SHOWN"])) == 8 and set(demo["SHOWN"]) <= names


def test_the_report_is_written_after_picture_knn_and_probe_and_the_export_is_loaded(
    demo: dict[str, Any],
    tiny: Pretrain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[str] = []
    leanmim.export(run=fake_run(tiny, tmp_path / "run").out)

    def accuracies(name: str) -> Iterator[tuple[str, float]]:
        yield "pretrained", 0.5
        done.append(name)

    for name in ("pretrain", "show", "report"):
        monkeypatch.setattr(leanmim, name, lambda *given, name=name, **fields: done.append(name), raising=False)
    for name in ("knn", "probe"):
        monkeypatch.setattr(leanmim, name, lambda name=name, **fields: accuracies(name), raising=False)
    monkeypatch.setitem(demo["main"].__globals__, "cut", lambda *folders: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    demo["main"]()  # which runs the lines that it prints
    assert done == ["pretrain", "show", "knn", "probe", "report"]
    assert "timm.create_model" in capsys.readouterr().out
