"""Files and classes with names that are trouble: every command ends well, and the names can be recognised."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.classifier.finetune import finetune
from leanmim.classifier.predict import predict
from leanmim.classifier.recipes import RECIPES
from leanmim.config import Embed, Predict, Pretrain
from leanmim.evaluators.embed import embed
from leanmim.names import one_line, shortened
from leanmim.run import Run
from leanmim.train.pretrain import pretrain
from tests.corpus import NAMES
from tests.helpers import PHOTOS

CLASSES = ("$a_b^$", "new\nline", "\udcfe")


def named(folder: Path, *, broken: bool = True) -> Path:
    """A photo of every name, and a broken file of the worst one."""
    folder.mkdir(parents=True)
    photos = sorted(PHOTOS.glob("*.jpg"))
    try:
        for name, photo in zip(NAMES, photos, strict=False):
            (folder / name).write_bytes(photo.read_bytes())
        if broken:
            (folder / "$bad_\n\udcff$.png").write_bytes(b"no picture")
    except OSError:
        pytest.skip("this file system takes only names that are text")
    return folder


@pytest.mark.results
def test_pre_training_and_its_page_end_well(tiny: Pretrain, tmp_path: Path) -> None:
    config = replace(tiny, data=str(named(tmp_path / "photos")), max_bad_share=0.5)
    pretrain(config)
    run = Run(Path(config.out))
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "$bad_\n\\udcff$.png" in page
    assert (run.folder / "reconstructions.png").is_file()
    assert set(NAMES) < set(json.loads(run.names.read_text())["names"])
    assert json.loads(run.skipped.read_text())["path"].endswith("$bad_\n\udcff$.png")
    vectors = embed(Embed(start=config.out, data=config.data, out=str(tmp_path / "a.npy"), device="cpu", workers=0))
    lines = vectors.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    assert {os.path.basename(line) for line in lines} == {one_line(name) for name in NAMES}


def test_fine_tuning_and_predicting_end_well(tmp_path: Path, tiny: Pretrain) -> None:
    for part in ("train", "val"):
        for name in CLASSES:
            named(tmp_path / "photos" / part / name, broken=False)
    config = replace(
        RECIPES["small"],
        start="scratch",
        model=tiny.model,
        model_kwargs=tiny.model_kwargs,
        data=str(tmp_path / "photos"),
        out=str(tmp_path / "tuned"),
        input_size=(32,),
        epochs=1,
        batch_size=8,
        workers=0,
        device="cpu",
    )
    finetune(config)
    folder = Path(config.out)
    assert "\\udcfe" in (folder / "report.html").read_text(encoding="utf-8")
    assert json.loads((folder / "results.json").read_text())["classes"] == sorted(CLASSES)
    table = predict(
        Predict(run=config.out, images=(config.data,), out=str(tmp_path / "a.csv"), device="cpu", workers=0)
    )
    assert b"\xff.jpg" in table.read_bytes() and b"$5_to_$.jpg" in table.read_bytes()


def test_a_name_is_one_line_of_text() -> None:
    assert one_line("a\nb\t\udcff\x1b[0m é \N{GRINNING FACE}") == "a\\nb\\t\\udcff\\x1b[0m é \N{GRINNING FACE}"
    assert shortened("x" * 30, 25) == "x" * 11 + "..." + "x" * 10 and shortened("a\nb", 25) == "a\\nb"
