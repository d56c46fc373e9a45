"""What a fine-tuning leaves: scikit-learn's numbers, a table that can be read back, whole files only."""

import csv
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from leanmim.classifier.results import (
    Predictions,
    class_accuracies,
    confusion_matrix,
    likeliest,
    measures,
    top_accuracy,
    write_predictions,
    write_results,
)
from leanmim.evaluators.accuracy import Accuracy

FACTS = {"data": "photos", "split": "val", "step": 30, "epoch": 3.0, "weights": "best"}


def drawn(classes: int, images: int, seed: int = 0, right: float = 1.0) -> Predictions:
    """Random probabilities, somewhat higher for the true class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=images)
    logits = draw.normal(size=(images, classes))
    logits[np.arange(images), labels] += right
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = [f"val/{label}/{i}.jpg" for i, label in enumerate(labels)]
    return Predictions([f"class {i}" for i in range(classes)], names, labels, probabilities)


def grey(index: int) -> Image.Image:
    return Image.new("RGB", (40, 30 + index % 5), (index % 256,) * 3)


def write(folder: Path, found: Predictions, read: Callable[[int], Image.Image] = grey) -> dict[str, object]:
    return write_results(folder, found, read, **FACTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [2, 5, 6, 30])
def test_all_accuracies_are_those_of_scikit_learn(classes: int) -> None:
    found = drawn(classes, 400)
    predicted, every = found.probabilities.argmax(1), list(range(classes))
    ours = measures(found)
    confusion = metrics.confusion_matrix(found.labels, predicted, labels=every)
    assert ours["confusion"] == confusion.tolist()
    assert ours["counts"] == np.bincount(found.labels, minlength=classes).tolist()
    assert ours["top1"] == pytest.approx(metrics.accuracy_score(found.labels, predicted))
    assert ours["mean_per_class"] == pytest.approx(metrics.balanced_accuracy_score(found.labels, predicted))
    recall = metrics.recall_score(found.labels, predicted, labels=every, average=None)
    assert ours["per_class"] == pytest.approx(recall.tolist())
    if classes > 5:
        top5 = metrics.top_k_accuracy_score(found.labels, found.probabilities, k=5, labels=every)
        assert ours["top5"] == pytest.approx(top5)
    else:
        assert ours["top5"] is None and ours["top5_interval"] is None


def test_accuracies_have_wilsons_interval() -> None:
    found = drawn(10, 200)
    right = int((found.probabilities.argmax(1) == found.labels).sum())
    assert measures(found)["top1_interval"] == Accuracy(right, 200).interval
    assert top_accuracy(found).images == 200
    assert top_accuracy(found, 10) == 1.0


def test_a_class_that_is_never_predicted_and_one_without_images() -> None:
    probabilities = np.array([[0.7, 0.1, 0.2], [0.6, 0.2, 0.2], [0.1, 0.0, 0.9], [0.9, 0.05, 0.05]])
    found = Predictions(["a", "b", "c"], list("wxyz"), np.array([0, 1, 0, 0]), probabilities)
    ours = measures(found)
    assert ours["confusion"] == [[2, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert ours["per_class"] == [2 / 3, 0.0, None] and ours["counts"] == [3, 1, 0]
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = metrics.balanced_accuracy_score(found.labels, probabilities.argmax(1))
    assert ours["mean_per_class"] == pytest.approx(expected)
    assert class_accuracies(confusion_matrix(found)) == ours["per_class"]


def test_the_likeliest_come_first() -> None:
    probabilities = drawn(7, 20).probabilities
    for row, best in zip(probabilities, likeliest(probabilities, 3), strict=True):
        assert sorted(row, reverse=True)[:3] == row[best].tolist()
    assert likeliest(probabilities, 9).shape == (20, 7)


def test_results_json_holds_all_and_is_what_is_returned(tmp_path: Path) -> None:
    found = drawn(6, 20)
    returned = write(tmp_path, found)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == json.loads(json.dumps({**FACTS, **measures(found)})) == json.loads(json.dumps(returned))


@pytest.mark.parametrize("classes", [2, 8])
def test_predictions_can_be_read_back(classes: int, tmp_path: Path) -> None:
    found = drawn(classes, 30)
    names = ['with, comma "and quotes".jpg', "new\nline.jpg", os.fsdecode(b"caf\xe9.jpg"), *found.names[3:]]
    classes_named = ["a, b", *found.classes[1:]]
    table = tmp_path / "predictions.csv"
    write_predictions(table, Predictions(classes_named, names, found.labels, found.probabilities), 5)
    with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    k = min(5, classes)
    assert len(rows) == 30
    assert list(rows[0])[:4] == ["path", "label", "class", "probability"]
    assert len(rows[0]) == 2 + 2 * k
    assert [row["path"] for row in rows] == names
    for i, row in enumerate(rows):
        assert row["label"] == classes_named[found.labels[i]]
        best = np.argsort(-found.probabilities[i])
        for rank in range(k):
            suffix = f"_{rank + 1}" if rank else ""
            assert row[f"class{suffix}"] == classes_named[best[rank]]
            assert float(row[f"probability{suffix}"]) == pytest.approx(found.probabilities[i, best[rank]], abs=1e-6)


def test_files_are_whole_or_those_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, drawn(3, 20))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["confusion.png", "mistakes.png", "predictions.csv", "results.json"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, drawn(3, 20, seed=1))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.usefixtures("whole_pictures")
@pytest.mark.parametrize("classes", [2, 16, 41])
def test_pictures_are_drawn_for_few_and_many_classes(classes: int, tmp_path: Path) -> None:
    write(tmp_path, drawn(classes, 4, seed=1, right=0.0))
    for name in ("confusion", "mistakes"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG" and min(picture.size) >= 300


def test_the_most_confident_mistakes_are_drawn_and_unreadable_files_are_not(tmp_path: Path) -> None:
    found = drawn(3, 90, right=0.0)
    wrong = np.flatnonzero(found.probabilities.argmax(1) != found.labels)
    order = wrong[np.argsort(-found.probabilities[wrong].max(1))].tolist()
    asked = []

    def read(index: int) -> Image.Image:
        asked.append(index)
        if index == order[2]:
            raise OSError("gone")
        return grey(index)

    write(tmp_path, found, read)
    assert asked == order[:17]  # 16 are drawn


def test_without_mistakes_there_is_no_picture_of_them(tmp_path: Path) -> None:
    write(tmp_path, drawn(3, 20, right=0.0))
    assert (tmp_path / "mistakes.png").is_file()
    write(tmp_path, drawn(3, 20, right=100.0))
    assert not (tmp_path / "mistakes.png").exists()


def test_names_are_no_formulas_and_may_be_in_any_script(tmp_path: Path) -> None:
    found = drawn(3, 20, right=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, Predictions(["$\\frac$", "猫", "c" * 99], ["$x_$.jpg"] * 20, found.labels, found.probabilities))
    assert (tmp_path / "mistakes.png").is_file()


def test_names_that_are_no_text_are_drawn_and_kept(tmp_path: Path) -> None:
    """Of class folders and files."""
    found = drawn(3, 20, right=0.0)
    write(tmp_path, Predictions(["a\udcff", "b", "c"], ["x\udcfe.jpg"] * 20, found.labels, found.probabilities))
    assert (tmp_path / "confusion.png").is_file() and (tmp_path / "mistakes.png").is_file()
    table = (tmp_path / "predictions.csv").read_bytes()
    assert b"x\xfe.jpg" in table and b"a\xff" in table
    assert json.loads((tmp_path / "results.json").read_text())["classes"][0] == "a\udcff"
