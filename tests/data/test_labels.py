"""Which images train and which validate is a function of folder, shares and seed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from leanmim.data.labels import Labels, choose_labels
from leanmim.errors import UserError
from tests.classifier.folders import names
from tests.data.pictures import touch


def choice(root: Path, **changes: object) -> Labels:
    return choose_labels(root, **changes)  # type: ignore[arg-type]


def counted(labels: Labels, part: str = "train") -> dict[str, int]:
    return dict(Counter(labels.classes[label] for label in getattr(labels, f"{part}_labels")))


def test_a_folder_of_train_and_val_is_taken_as_it_is(tmp_path: Path) -> None:
    touch(tmp_path, "train/dog/2.png", "train/dog/deep/1.jpg", "train/cat/3.png", "val/dog/4.png", "val/dog/.x.png")
    labels = choice(tmp_path)
    assert labels == Labels(
        root=str(tmp_path),
        classes=["cat", "dog"],
        train=["train/cat/3.png", "train/dog/2.png", "train/dog/deep/1.jpg"],
        val=["val/dog/4.png"],
        train_labels=[0, 1, 1],
        val_labels=[1],
        notes=["no image in val of 1 of 2 classes: cat"],
    )
    assert labels.counts == [1, 2]


@pytest.mark.parametrize("layout", ["train", "."], ids=["train only", "class folders only"])
def test_without_val_a_share_of_each_class_is_held_out(tmp_path: Path, layout: str) -> None:
    names(tmp_path / layout, a=40, b=20, c=10, d=2, e=1)
    labels = choice(tmp_path)
    assert counted(labels, "val") == {"a": 4, "b": 2, "c": 1, "d": 1}
    assert counted(labels) == {"a": 36, "b": 18, "c": 9, "d": 1, "e": 1}
    assert len({*labels.train, *labels.val}) == 73
    assert labels.notes == [
        "no val folder: 8 of 73 images are held out, of each class a share (--val-share 0.1) but never its only image",
        "no image in val of 1 of 5 classes: e",
    ]
    for part in ("train", "val"):
        folders = [Path(name).parent.name for name in getattr(labels, part)]
        assert folders == [labels.classes[label] for label in getattr(labels, f"{part}_labels")]
    assert counted(choice(tmp_path, val_share=0.5), "val") == {"a": 20, "b": 10, "c": 5, "d": 1}
    assert choice(tmp_path) == labels
    assert choice(tmp_path, seed=1).val != labels.val


def test_every_image_is_held_out_by_some_seeds(tmp_path: Path) -> None:
    names(tmp_path, a=5, b=5)
    times = Counter(name for seed in range(60) for name in choice(tmp_path, val_share=0.2, seed=seed).val)
    assert len(times) == 10
    assert all(2 < count < 25 for count in times.values())  # 12 on average, deviation 3


@pytest.mark.parametrize("layout", [("train", "val"), ("train",)], ids=["val", "no val"])
def test_a_share_of_the_labels_is_stratified_and_nested(tmp_path: Path, layout: tuple[str, ...]) -> None:
    for part in layout:
        names(tmp_path / part, a=100, b=30, c=4)
    whole = choice(tmp_path)
    before: set[str] = set()
    for share in (0.01, 0.05, 0.1, 0.3, 0.9, 1.0):
        labels = choice(tmp_path, label_share=share)
        assert counted(labels) == {name: max(1, round(share * count)) for name, count in counted(whole).items()}
        assert before <= set(labels.train) <= set(whole.train)
        assert labels.val == whole.val
        before = set(labels.train)
    assert labels == whole


def test_so_many_labels_a_class_are_nested_too(tmp_path: Path) -> None:
    names(tmp_path / "train", a=100, b=30, c=4)
    names(tmp_path / "val", a=1, b=1, c=1)
    before: set[str] = set()
    for each in (1, 4, 10, 40):
        labels = choice(tmp_path, labels_per_class=each)
        assert counted(labels) == {"a": min(each, 100), "b": min(each, 30), "c": min(each, 4)}
        assert before <= set(labels.train)
        before = set(labels.train)
    assert set(choice(tmp_path, label_share=0.1).train) <= before
    assert choice(tmp_path, labels_per_class=4, seed=1).train != choice(tmp_path, labels_per_class=4).train
    assert choice(tmp_path, labels_per_class=4).notes == [
        "12 of 134 labels are used (--labels-per-class 4), 4 to 4 a class"
    ]
    assert choice(tmp_path, label_share=0.1).notes == ["14 of 134 labels are used (--label-share 0.1), 1 to 10 a class"]
    assert choice(tmp_path).notes == choice(tmp_path, labels_per_class=100).notes == []


def test_the_choice_does_not_depend_on_where_the_folder_lies_and_little_on_one_more_image(tmp_path: Path) -> None:
    one, two = (choice(names(tmp_path / folder, a=50, b=50), label_share=0.2) for folder in "12")
    assert one.train == two.train and one.val == two.val
    touch(tmp_path, "2/a/more.png")
    more = choice(tmp_path / "2", label_share=0.2)
    assert len(set(one.train) ^ set(more.train)) + len(set(one.val) ^ set(more.val)) <= 4
    assert [n for n in one.train if n.startswith("b")] == [n for n in more.train if n.startswith("b")]


def test_other_folders_beside_train_are_said_to_be_left_out(tmp_path: Path) -> None:
    names(tmp_path / "train", a=5, b=5)
    names(tmp_path / "valid", a=5, b=5)
    first, second = choice(tmp_path).notes
    assert first == "only train and val are read, not valid"
    assert second.startswith("no val folder: 2 of 10 images are held out")


def test_what_was_chosen_is_stored_and_compared(tmp_path: Path) -> None:
    began = choice(names(tmp_path / "1", a=12, b=12))
    stored = Labels.from_json(json.loads(json.dumps(began.to_json())))
    assert stored == began
    choice(names(tmp_path / "2", a=12, b=9)).check_classes(
        stored
    )  # it was moved, and other images are looked at elsewhere
    (tmp_path / "1" / "a").rename(tmp_path / "1" / "c")
    with pytest.raises(UserError) as error:
        choice(tmp_path / "1").check_classes(stored)
    assert str(error.value) == (
        "the classes in --data are not those that the run began with:\n  1 classes added: c\n  1 classes removed: a\n"
        "Put them back, or start afresh in another --out (or with --overwrite)"
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train/a/1.png", "val/a/1.png"], ["one class only (a)", "two or more"]),
        (["a/1.png", "a/2.png"], ["one class only (a)"]),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], ["val", "classes that train has not: c"]),
        (["train/a/1.png", "train/b/1.png", "train/1.png"], ["train/1.png' lies outside of class folders"]),
        (["train/a/1.png", "train/b/1.png", "val/1.png"], ["val/1.png' lies outside of class folders", "val/CLASS/"]),
        (["a/1.png", "b/1.png", "1.png"], ["1.png' lies outside of class folders"]),
        (["1.png", "2.png"], ["1.png' lies outside of class folders"]),
        (["train/1.txt", "val/a/1.png"], ["train' holds 1 files but no images"]),
        (["train/a/1.png", "train/b/1.png", "val/a/1.txt"], ["val' holds 1 files but no images"]),
        (["train/a/1.png", "train/b/1.png", "train/c/1.txt"], ["class folders without images: c", "remove"]),
        (["val/a/1.png", "val/b/1.png"], ["no folder 'train', but val", "train/CLASS and val/CLASS"]),
        (["training/a/1.png", "test/b/1.png"], ["no folder 'train', but test, training"]),
        (["a/1.png", "b/1.png"], ["one image a class and no val folder"]),
        (["notes/1.txt"], ["holds 1 files but no images"]),
    ],
)  # fmt: skip
def test_mistakes_in_a_folder_are_errors_with_a_remedy(tmp_path: Path, files: list[str], words: list[str]) -> None:
    touch(tmp_path, *files)
    with pytest.raises(UserError) as error:
        choice(tmp_path)
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("part", ["train", "val"])
def test_two_classes_in_one_folder_are_named(part: str, tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    touch(tmp_path, "train/z/1.png") if part == "val" else None
    (tmp_path / part / "z").symlink_to("b")
    with pytest.raises(UserError, match=rf"'.*/{part}/b' and '.*/{part}/z' are one folder, by a link; remove one"):
        choice(tmp_path)


def test_a_missing_folder_and_a_file_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.zip")
    for name, words in (("a.zip", "is a file"), ("nowhere", "is no folder")):
        with pytest.raises(UserError, match=rf"--data '.*{name}' {words}; a labelled folder holds train/CLASS"):
            choice(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty' holds no files"):
        choice(tmp_path / "empty")
