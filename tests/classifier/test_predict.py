"""`leanmim predict`: the model's own probabilities, in a table that is whole or not there."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from leanmim.classifier import predict as module
from leanmim.classifier.predict import predict
from leanmim.config import Pretrain
from leanmim.config.base import Model
from leanmim.config.predict import Predict
from leanmim.data import Files, Normalise, centre_crop, list_images
from leanmim.errors import UserError
from leanmim.start import Start
from tests.config.docstrings import docstrings
from tests.runs import untrained

CLASSES = ("bee", "cat, or kitten", "crab", "lemur", "macaw", "sheep")
MODEL = Model(
    model="vit_tiny_patch16_224",
    model_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    input_size=(32,),
)


@pytest.fixture(autouse=True)
def classifier(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A classifier that every RUN stands for; its head is not small, so that its probabilities differ."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL.model, num_classes=6, img_size=32, **MODEL.model_kwargs).eval()
    nn.init.normal_(model.head.weight)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.2, 0.3]

    def open_start(run: str, input_size: tuple[int, ...] = ()) -> Start:
        own = replace(MODEL, input_size=input_size or MODEL.input_size)
        return Start(own, model.state_dict(), mean, std, run, classes=CLASSES)

    monkeypatch.setattr(module, "open_start", open_start)
    return model


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """Six of the photos."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i, photo in enumerate(list_images(photos)[:6]):
        shutil.copy(photo, tmp_path / "images" / ("sub" if i % 2 else "") / photo.name)
    return tmp_path / "images"


def options(table: Path, *given: Path | str, **more: Any) -> Predict:
    return Predict(**dict(run="run", images=tuple(map(str, given)), out=str(table), device="cpu", workers=0) | more)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected(model: nn.Module, paths: list[Path], crop: float = 1.0) -> np.ndarray:
    """One image after the other."""
    normalise = Normalise([0.4, 0.5, 0.6], [0.2, 0.2, 0.3], torch.device("cpu"))
    cut, source = centre_crop((32, 32), crop), Files("", paths, 3)
    with torch.no_grad():
        return torch.cat([model(normalise(cut(source.read(i))[None])) for i in range(len(paths))]).softmax(1).numpy()


@pytest.mark.parametrize("crop", [None, 0.5])
def test_the_table_holds_the_models_own_probabilities(
    crop: float | None, images: Path, classifier: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "table.csv"
    assert predict(options(out, images, batch_size=4, crop=crop, top=3)) == out
    paths, found = list_images(images), rows(out)
    assert [row["path"] for row in found] == list(map(str, paths))
    assert list(found[0]) == ["path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    for row, probabilities in zip(found, expected(classifier, paths, crop or 1.0), strict=True):
        best = np.argsort(-probabilities)[:3]
        assert [row[name] for name in ("class", "class_2", "class_3")] == [CLASSES[i] for i in best]
        shares = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert shares == pytest.approx(probabilities[best], abs=1e-5)
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in out.parent.iterdir()] == ["table.csv"]


def test_files_patterns_lists_and_folders_in_the_order_given(images: Path, tmp_path: Path) -> None:
    paths = list_images(images)
    (tmp_path / "list.txt").write_text(f"{paths[1]}\n")
    out = predict(options(tmp_path / "a.csv", paths[2], paths[0], tmp_path / "list.txt", f"{images}/s*", paths[0]))
    sub = [path for path in paths if path.parent.name == "sub"]
    expected = list(dict.fromkeys([paths[2], paths[0], paths[1], *sub]))  # a file counts once
    assert [row["path"] for row in rows(out)] == list(map(str, expected))
    (only,) = rows(predict(options(tmp_path / "one.csv", paths[3], top=99)))
    assert only["path"] == str(paths[3]) and len(only) == 13
    assert sum(float(value) for name, value in only.items() if name.startswith("probability")) == pytest.approx(
        1, abs=1e-5
    )


def test_unreadable_files_are_listed_and_are_no_end(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jpg", "sub/zz.png"):
        (images / name).write_bytes(b"no picture")
    out = tmp_path / "table.csv"
    predict(options(out, images, batch_size=1))
    assert [row["path"] for row in rows(out)] == [
        str(path) for path in list_images(images) if path.stem not in ("a", "zz")
    ]
    skipped = tmp_path / "table.csv.skipped.jsonl"
    lines = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(images / "a.jpg"), str(images / "sub/zz.png")]
    assert all("UnidentifiedImageError" in line["reason"] for line in lines)
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1
    assert "2 of 8 files cannot be read" in stderr and "a.jpg" in stderr and str(skipped) in stderr
    for name in ("a.jpg", "sub/zz.png"):
        (images / name).unlink()
    predict(options(out, images, overwrite=True))
    assert not skipped.exists()


def test_nothing_is_left_where_no_file_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 image files can be read; the first: .*a\.jpg"):
        predict(options(tmp_path / "table.csv", tmp_path / "bad"))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_table_is_not_replaced_unasked_nor_by_a_part(
    images: Path, tmp_path: Path, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.csv"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"table\.csv' is there already; choose another name, or --overwrite"):
        predict(options(out, images))
    calls = iter(range(2))

    def killed(*_: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    hook = classifier.register_forward_hook(killed)
    monkeypatch.setattr(module, "build_classifier", lambda start: classifier)
    with pytest.raises(KeyboardInterrupt):
        predict(options(out, images, overwrite=True, batch_size=1))
    assert out.read_text() == "mine" and not list(tmp_path.glob("*.part"))
    hook.remove()
    predict(options(out, images, overwrite=True, batch_size=1))
    assert len(rows(out)) == 6


def test_grey_images_of_any_size_and_another_input_size(tmp_path: Path) -> None:
    Image.new("L", (90, 20), 77).save(tmp_path / "grey.png")
    (row,) = rows(predict(options(tmp_path / "a.csv", tmp_path / "grey.png", input_size=(48,))))
    assert row["class"] in CLASSES


def test_a_run_of_pre_training_is_no_classifier(
    tiny: Pretrain, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    run = untrained(tiny)
    with pytest.raises(
        UserError, match="is an encoder, which knows no classes; fine-tune it first with `leanmim finetune`"
    ):
        predict(options(tmp_path / "a.csv", images, run=str(run)))
    assert not (tmp_path / "a.csv").exists()


def test_the_help_promises_what_there_is() -> None:
    """Published classifiers come without names of classes; the crop is the fine-tuning's, as `classify` takes it."""
    helps = docstrings(Predict)
    assert "published" not in helps["run"] and "None is the fine-tuning's own" in helps["crop"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": ()}, "give the images, as files or folders"),
        ({"images": ("nowhere",)}, "there is no folder 'nowhere'"),
        ({"top": 0}, "--top 0 is out of range"),
        ({"batch_size": 0}, "--batch-size 0 is out of range"),
        ({"crop": 2.0}, r"--crop 2.0 is out of range"),
        ({"input_size": (1, 2, 3)}, "--input-size takes one number or two"),
        ({"out": "."}, r"--out '\.' is a folder; give the name of a table"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        predict(options(tmp_path / "a.csv", images, **change))


def test_names_that_are_no_text_are_kept(images: Path, tmp_path: Path) -> None:
    list_images(images)[0].rename(images / "a\udcfe.jpg")
    (images / "bad\udcff.png").write_bytes(b"no picture")
    out = predict(options(tmp_path / "table.csv", images))
    assert f"{images}/a".encode() + b"\xfe.jpg" in out.read_bytes()
    (listed,) = map(json.loads, (tmp_path / "table.csv.skipped.jsonl").read_text().splitlines())
    assert listed["path"] == f"{images}/bad\udcff.png"


def test_a_place_that_cannot_be_written_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*; choose another name"):
        predict(options(tmp_path / "file" / "a.csv", images))
