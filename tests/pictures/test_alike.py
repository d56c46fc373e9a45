"""Pictures of what is alike and what is mistaken: neighbours are brute force's, mistakes are wrong, classes are folders."""

import csv
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from torch.nn.functional import normalize

from leanmim import pictures
from leanmim.config import Pretrain, Show
from leanmim.data import Files, open_source
from leanmim.errors import UserError
from leanmim.evaluators import cache
from leanmim.pictures import show
from leanmim.pictures.maps import OTHERS, arranged, class_colours
from leanmim.pictures.mistakes import Prediction, worst_mistakes
from leanmim.pictures.neighbours import agreement, most_alike, telling
from leanmim.pictures.shown import class_names, embedded, open_shown
from leanmim.run import Run, write_json
from tests.drawn import Drawn, run_of
from tests.formats.classifiers import CLASSES, finetuned
from tests.helpers import PHOTOS, seeded
from tests.runs import labelled, noisy_tiles

FACTS = ["path", "label", "class", "probability", "class_2", "probability_2"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    kept: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: kept.append(figure))
    return kept


# Neighbours


def test_neighbours_are_those_of_brute_force() -> None:
    x = normalize(torch.randn(40, 8, generator=seeded(0)), dim=1)
    similarities, rows = most_alike(x, torch.tensor([3, 17]), 5)
    vectors = x.double().numpy()
    for query, values, near in zip((3, 17), similarities.tolist(), rows.tolist(), strict=True):
        cosines = [(float(vectors[query] @ vectors[i]), i) for i in range(40) if i != query]
        best = sorted(cosines, reverse=True)[:5]
        assert near == [i for _, i in best]
        assert values == pytest.approx([value for value, _ in best], abs=1e-6)


def test_of_few_images_all_are_neighbours() -> None:
    x = normalize(torch.randn(3, 8, generator=seeded(0)), dim=1)
    _, rows = most_alike(x, torch.tensor([1]))
    assert sorted(rows[0].tolist()) == [0, 2]


@pytest.mark.parametrize(("least", "digits"), [(-0.5, 3), (0.4, 3), (0.995, 4), (0.9991, 5), (1.0, 6)])
def test_cosines_have_the_digits_that_tell_them_apart(least: float, digits: int) -> None:
    assert telling(torch.tensor([[1.0, least]])) == digits


def test_agreement_counts_and_compares_with_chance() -> None:
    classes = ["a", "a", "a", "b", "b"]
    assert agreement(classes, [0, 3], [[1, 3], [4, 0]]).startswith(
        "2 of 4 are of the photo's class (50%; by chance 38%)"
    )
    assert agreement([], [0], [[1]]) == ""


def test_the_picture_of_neighbours(tiny: Pretrain, tmp_path: Path, drawn: Drawn) -> None:
    """Red and blue images are told apart by a random network; the classes are the folders."""
    data, run = labelled(tmp_path / "data", 4), run_of(tiny)
    path = show(Show(runs=(str(run),), picture="neighbours", images=(str(data),), count=2))
    assert path == run / "neighbours.png" and path.is_file()
    assert len(drawn.pictures) == 2 * 7
    titles = [text for text in drawn.texts if "\n" in text][:-1]
    assert sum("✓" in title for title in titles) + sum("✗" in title for title in titles) == 12
    for title in titles:
        assert title.split()[0] in ("red", "blue") and 0 < float(title.split()[-1]) <= 1
    own, other = titles[:6], titles[6:]
    query = [text for text in drawn.texts if text in ("red", "blue")]
    for row, name in zip((own, other), query, strict=True):
        assert all(("✓" in title) == title.startswith(name) for title in row)
        values = [float(title.split()[-1]) for title in row]
        assert values == sorted(values, reverse=True)
    assert "6 most alike of 16 images" in drawn.texts[-1] and "by chance 47%" in drawn.texts[-1]


def test_without_classes_there_is_no_agreement(tiny: Pretrain, drawn: Drawn) -> None:
    show(Show(runs=(str(run_of(tiny)),), picture="neighbours", count=1, among=5))
    assert "6 most alike" not in drawn.texts[-1] and "4 most alike of 5 images" in drawn.texts[-1]
    assert not any(mark in text for text in drawn.texts for mark in "✓✗")
    assert "astronaut.jpg" in drawn.texts


def test_features_are_computed_once(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(run_of(tiny))
    show(Show(runs=(run,), picture="neighbours", count=1))
    monkeypatch.setattr(cache, "stream", None)
    show(Show(runs=(run,), picture="neighbours", count=3))
    show(Show(runs=(run,), picture="map"))  # of the same images


def test_embedded_are_the_means_of_the_patches(tiny: Pretrain) -> None:
    config = Show(runs=(str(run_of(tiny)),))
    shown = open_shown(config)
    places, x = embedded(config, shown, 4)
    assert places == [0, 4, 8, 12]
    with torch.no_grad():
        tokens = shown.backbone.forward_features(shown.normalise(shown.photos(places, 32)))
    torch.testing.assert_close(x, normalize(tokens[:, 1:].mean(1), dim=1).cpu(), atol=1e-5, rtol=1e-4)


def test_one_image_has_no_neighbours(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="two images or more; give more with --images"):
        show(Show(runs=(str(run_of(tiny)),), picture="neighbours", images=(str(PHOTOS / "cat.jpg"),)))


def test_unreadable_images_are_left_out(tiny: Pretrain, tmp_path: Path, drawn: Drawn) -> None:
    shutil.copytree(PHOTOS, tmp_path / "photos")
    (tmp_path / "photos" / "bee.jpg").write_text("no picture")
    show(Show(runs=(str(run_of(replace(tiny, data=str(tmp_path / "photos")))),), picture="neighbours", count=2))
    assert "of 15 images" in drawn.texts[-1]


# Classes


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/1.jpg", "dog/2.jpg"], ["cat", "dog"]),
        (["train/cat/1.jpg", "val/dog/old/2.jpg"], ["cat", "dog"]),
        (["/home/me/val/cat/1.jpg", "/home/me/val/dog/2.jpg"], ["cat", "dog"]),
        (["train/cat/1.jpg", "train/cat/2.jpg"], []),
        (["cat/1.jpg", "2.jpg"], []),
        (["1.jpg", "2.jpg"], []),
        (["1.jpg"], []),
    ],
)
def test_a_class_is_a_folder(names: list[str], classes: list[str]) -> None:
    assert class_names(Files("", names, 3)) == classes


def test_classes_of_several_folders(tmp_path: Path) -> None:
    folders = [labelled(tmp_path / name, 1) for name in "ab"]
    names = class_names(open_source([str(folder) for folder in folders], 3))
    assert sorted(names) == ["blue"] * 4 + ["red"] * 4


# The map


def test_a_map_puts_what_is_alike_together() -> None:
    groups = torch.arange(3).repeat_interleave(20)
    x = normalize(torch.eye(3, 16)[groups] + 0.05 * torch.randn(60, 16, generator=seeded(0)), dim=1)
    points = arranged(x, 0)
    assert points.shape == (60, 2) and np.array_equal(points, arranged(x, 0))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag([np.inf] * 60)
    assert (groups.numpy()[distances.argmin(1)] == groups.numpy()).all()


def test_the_picture_of_a_map(tiny: Pretrain, tmp_path: Path, figures: list[Figure]) -> None:
    data = noisy_tiles(tmp_path / "data", 4, 2)
    show(Show(runs=(str(run_of(tiny)),), picture="map", images=(str(data),), count=12))
    (figure,) = figures
    boxes = [artist for artist in figure.axes[0].artists if isinstance(artist, AnnotationBbox)]
    assert len(boxes) == 12
    legend = {text.get_text(): handle.get_facecolor()[:3] for text, handle in
              zip(figure.legends[0].get_texts(), figure.legends[0].get_patches(), strict=True)}  # fmt: skip
    assert set(legend) == {"red", "green", "blue"}
    assert {box.patch.get_edgecolor()[:3] for box in boxes} == set(legend.values())
    assert "12 of 18 images; t-SNE" in figure._supxlabel.get_text()  # type: ignore[attr-defined]


def test_a_map_without_classes(tiny: Pretrain, figures: list[Figure]) -> None:
    show(Show(runs=(str(run_of(tiny)),), picture="map"))
    assert not figures[0].legends and "\n16 images" in figures[0]._supxlabel.get_text()  # type: ignore[attr-defined]


def test_a_map_of_few_images(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match=r"a map needs 5 images or more, and there are 4"):
        show(Show(runs=(str(run_of(tiny)),), picture="map", count=4))


def test_the_most_frequent_classes_have_colours() -> None:
    classes = [str(i) for i in range(30) for _ in range(1 + (i < 20))]
    colours, legend = class_colours(classes)
    assert len(legend) == 21 and legend["10 other classes"] == OTHERS
    assert len(set(map(str, colours))) == 21
    assert all((colour == OTHERS) == (int(name) >= 20) for name, colour in zip(classes, colours, strict=True))
    assert class_colours([]) == ([], {})


# Mistakes


def run_with_predictions(folder: Path, rows: list[Prediction]) -> Path:
    finetuned("vit", folder)
    data = folder.parent / "photos"
    shutil.copytree(PHOTOS, data)
    labels = dict(
        root=str(data), classes=list(CLASSES), train=[], val=[row.name for row in rows], train_labels=[],
        val_labels=[CLASSES.index(row.label) for row in rows], notes=[],
    )  # fmt: skip
    write_json(Run(folder).labels, labels)
    with open(folder / "predictions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(FACTS)
        table.writerows([*row[:3], f"{row.probability:.6f}", "cat", "0"] for row in rows)
    return folder


ROWS = [
    Prediction("cat.jpg", "cat", "sheep", 0.6),
    Prediction("bee.jpg", "cat", "cat", 0.99),
    Prediction("sheep.jpg", "sheep", "blue macaw", 0.9),
    Prediction("gone.jpg", "sheep", "cat", 0.8),
    Prediction("macaw.jpg", "blue macaw", "cat", 0.7),
]


def test_mistakes_are_wrong_and_the_surest_come_first(tmp_path: Path, drawn: Drawn) -> None:
    run = run_with_predictions(tmp_path / "run", ROWS)
    assert show(Show(runs=(str(run),), picture="mistakes")) == run / "mistakes.png"
    titles = [text for text in drawn.texts if "→" in text][:-1]
    assert titles == ["sheep\n→ blue macaw, 90 %", "blue macaw\n→ cat, 70 %", "cat\n→ sheep, 60 %"]
    assert [text for text in drawn.texts if text.endswith(".jpg")] == ["sheep.jpg", "macaw.jpg", "cat.jpg"]
    assert "4 of 5 validation images are mistaken (80.0%)" in drawn.texts[-1]


def test_so_many_mistakes_as_are_asked_for(tmp_path: Path, drawn: Drawn) -> None:
    run = run_with_predictions(tmp_path / "run", ROWS)
    out = tmp_path / "two.png"
    assert show(Show(runs=(str(run / "checkpoints" / "last.pt"),), picture="mistakes", count=2, out=str(out))) == out
    assert len(drawn.pictures) == 2


def test_the_worst_of_many() -> None:
    draw = np.random.default_rng(0)
    found = [Prediction(str(i), "a", "ab"[draw.integers(2)], float(draw.random())) for i in range(100)]
    chosen = [one for one, _ in worst_mistakes(found, lambda i: np.zeros((1, 1, 3)))]
    assert len(chosen) == 16 and all(one.label != one.predicted for one in chosen)
    assert all(a.probability >= b.probability for a, b in pairwise(chosen))
    left = {one.probability for one in found if one.predicted == "b"} - {one.probability for one in chosen}
    assert max(left) <= chosen[-1].probability


def test_runs_without_mistakes(tiny: Pretrain, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder of `leanmim finetune`: only a classifier makes mistakes"):
        show(Show(runs=(str(run_of(tiny)),), picture="mistakes"))
    run = run_with_predictions(tmp_path / "tuned", ROWS[1:2])
    with pytest.raises(UserError, match="makes no mistake on its 1 validation images"):
        show(Show(runs=(str(run),), picture="mistakes"))
    with pytest.raises(UserError, match="leave --images out"):
        show(Show(runs=(str(run),), picture="mistakes", images=("photos",)))
    (run / "predictions.csv").write_text("path,label\na,b\n")
    with pytest.raises(UserError, match=r"predictions.csv' is damaged"):
        show(Show(runs=(str(run),), picture="mistakes"))
    (run / "predictions.csv").unlink()
    with pytest.raises(UserError, match=r"has no predictions.csv.* let it go on"):
        show(Show(runs=(str(run),), picture="mistakes"))


def test_a_fine_tuned_run_shows_its_validation_images(tmp_path: Path, drawn: Drawn) -> None:
    rows = [row for row in ROWS if row.name != "gone.jpg"]
    show(Show(runs=(str(run_with_predictions(tmp_path / "run", rows)),), picture="neighbours", count=1))
    assert "3 most alike of 4 images" in drawn.texts[-1] and "fine-tuned" in drawn.texts[-1]
