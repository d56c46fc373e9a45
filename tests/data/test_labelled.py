"""Labelled folders: a class is a folder."""

from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from leanmim.data import centre_crop, labelled_pair, loader
from leanmim.data.labels import choose_labels
from leanmim.errors import UserError
from tests.data.pictures import CPU, forks, tree


def test_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/dog/1.png", "train/cat/2.png", "train/cat/deep/3.png", "val/dog/4.png")
    train, val = labelled_pair(str(root), 3, centre_crop((8, 8)))
    assert train.classes == val.classes == ["cat", "dog"]
    assert len(train) == 3 and len(val) == 1
    names = {"2.png": 0, "3.png": 0, "1.png": 1}
    assert {Path(name).name: label for name, label in zip(train.source.names, train.labels, strict=True)} == names
    assert val.labels == [1]
    image, label = val[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and label == 1
    assert torch.equal(val[9, 0][0], image)


def test_a_labelled_item_is_a_function_of_its_seed(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    train, _ = labelled_pair(root, 1, v2.Compose([v2.RandomCrop(4), v2.PILToTensor()]))
    assert torch.equal(train[5, 1][0], train[5, 1][0])
    assert len({train[seed, 1][0].numpy().tobytes() for seed in range(8)}) > 4


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["val/a/1.png", "val/b/1.png"], ["has no folder 'train'", "train/CLASS and val/CLASS"]),
        (["train/a/1.png", "train/b/1.png"], ["has one image a class and no val folder"]),
        (["train/a/1.png", "val/a/1.png"], ["train", "one class only", "two or more"]),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], ["val", "classes that training has not: c"]),
        (["train/a/1.png", "train/b/1.png", "train/1.png", "val/a/1.png"], ["train", "outside of class folders"]),
        (["train/a/1.png", "train/b/1.png", "val/1.png"], ["val", "outside of class folders"]),
    ],
    ids=["no train", "no val", "one class", "unknown class", "loose in train", "loose in val"],
)
def test_mistakes_in_a_labelled_folder_are_errors_with_a_remedy(tmp_path: Path, names, words: list[str]) -> None:
    tree(tmp_path, *names)
    with pytest.raises(UserError) as error:
        labelled_pair(tmp_path, 3, centre_crop((8, 8)))
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


def test_an_empty_part_of_a_labelled_folder_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="val' holds no files"):
        labelled_pair(tmp_path, 3, centre_crop((8, 8)))


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_labelled_file_is_named(tmp_path: Path, workers: int) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png")
    (tmp_path / "val/a/1.png").write_text("not a picture")
    _, val = labelled_pair(tmp_path, 3, centre_crop((8, 8)))
    with pytest.raises(UserError) as error:
        list(loader(val, [[(0, 0)]], workers, CPU, torch.utils.data.default_collate))
    assert str(error.value).startswith(f"{tmp_path}/val/a/1.png cannot be read")
    assert "remove it" in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("layout", ["train/", ""])
def test_without_val_the_images_are_those_that_fine_tuning_would_hold_out(tmp_path: Path, layout: str) -> None:
    tree(tmp_path, *(f"{layout}{name}/{i}.png" for name in "ab" for i in range(20)))
    train, val = labelled_pair(tmp_path, 3, centre_crop((8, 8)))
    chosen = choose_labels(tmp_path)
    assert (train.source.names, val.source.names) == (chosen.train, chosen.val)
    assert (train.labels, val.labels) == (chosen.train_labels, chosen.val_labels)
    assert len(val) == 4 and train.classes == val.classes == ["a", "b"]
    assert val[0][0].shape == (3, 8, 8)
