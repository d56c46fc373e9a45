"""The batches of fine-tuning are pure functions of seed and step; unreadable files do not end a run."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm.utils import random_seed
from torch import Tensor
from torch.nn.functional import cross_entropy

from leanmim.classifier.augment import eval_transform, mix, mixing, train_transform
from leanmim.classifier.data import (
    TrainImages,
    class_weights,
    steps_per_epoch,
    train_batches,
    val_batches,
)
from leanmim.config.finetune import Finetune
from leanmim.data import IMAGENET, Bad, Normalise, read_image
from leanmim.data.labels import Labels, choose_labels
from leanmim.errors import UserError
from leanmim.processes import Process
from tests.classifier.folders import photos, resolved
from tests.data.pictures import CPU, forks, noise
from tests.helpers import noisy

Batch = tuple[Tensor, Tensor, list[Bad]]


@pytest.fixture
def config(tmp_path: Path) -> Finetune:
    """Ten images to train, seven to validate."""
    photos(tmp_path / "train", a=6, b=4)
    photos(tmp_path / "val", 30, 40, a=3, b=4)
    return resolved(tmp_path)


def plain(config: Finetune, **changes: Any) -> Finetune:
    """Without augmentation, at the pictures' own size."""
    off = dict(randaugment="none", erase=0.0, flip=0.0, crop_scale=(1.0, 1.0))
    return resolved(config.data, **off, **changes)


def images_of(config: Finetune) -> TrainImages:
    return TrainImages(choose_labels(config.data), train_transform(config, *IMAGENET[3]), config.seed)


def feed(config: Finetune, start: int = 0, stop: int = 6, process: Process = Process(0, 1)) -> list[Batch]:  # noqa: B008
    labels = choose_labels(config.data)
    return list(train_batches(config, labels, train_transform(config, *IMAGENET[3]), start, stop, process))


def same(one: list[Batch], two: list[Batch]) -> bool:
    pairs = list(zip(one, two, strict=True))
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in pairs)


def damage(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_text("not a picture")


def test_an_item_depends_on_seed_epoch_and_index_only(config: Finetune) -> None:
    keys = [(epoch, index) for epoch in range(2) for index in range(10)]
    data, again, other = images_of(config), images_of(config), images_of(resolved(config.data, seed=1))
    first = {key: data[key][0] for key in keys}
    random_seed(9)
    second = {key: again[key][0] for key in reversed(keys)}
    assert all(torch.equal(first[key], second[key]) for key in keys)
    assert len({image.numpy().tobytes() for image in first.values()}) == 20
    assert not any(torch.equal(first[key], other[key][0]) for key in keys)
    assert all(data[key][1] == data.labels[key[1]] and data[key][2] == [] for key in keys)


def test_an_item_without_augmentation_is_the_normalised_picture(config: Finetune) -> None:
    data = images_of(plain(config))
    mean, std = IMAGENET[3]
    for index in range(10):
        image, label, _ = data[0, index]
        want = (noise(24, 24, index) / 255 - mean) / std
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), want, atol=1e-5)
        assert label == (index >= 6)


@forks
def test_batches_are_the_same_with_and_without_workers(config: Finetune) -> None:
    alone = feed(config)
    assert same(feed(resolved(config.data, workers=2)), alone)
    for images, labels, bad in alone:
        assert images.shape == (4, 3, 24, 24) and images.dtype == torch.float32
        assert labels.shape == (4,) and labels.dtype == torch.int64 and bad == []


def test_a_feed_leaves_the_random_numbers_of_the_process_alone(config: Finetune) -> None:
    # Python's own is left out: in tests beartype draws from it, to choose which items of a list it checks.
    random_seed(4)
    numpy, torchs = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    feed(config)
    assert numpy == np.random.get_state()[1].tolist() and torch.equal(torchs, torch.get_rng_state())  # noqa: NPY002


@pytest.mark.parametrize("batch_size", [3, 4, 16])
def test_a_feed_can_be_entered_at_any_step(config: Finetune, batch_size: int) -> None:
    config = resolved(config.data, batch_size=batch_size, accum=2)
    whole = feed(config, stop=4)
    assert len(whole) == 8
    for start in (1, 2, 3):
        assert same(feed(config, start, stop=4), whole[2 * start :])


def test_processes_share_the_images_of_one(config: Finetune) -> None:
    one = feed(config)
    two = [feed(resolved(config.data, batch_size=2), process=Process(rank, 2)) for rank in (0, 1)]
    assert all(torch.equal(x, torch.cat([a, b])) for (x, *_), (a, *_), (b, *_) in zip(one, *two, strict=True))


@pytest.mark.parametrize(("batch_size", "shown"), [(5, 5), (16, 8)])
def test_every_image_is_shown_as_often(config: Finetune, batch_size: int, shown: int) -> None:
    batches = feed(plain(config, batch_size=batch_size), 0, shown * 10 // batch_size)
    times = Counter(image.numpy().tobytes() for images, *_ in batches for image in images)
    assert len(times) == 10 and set(times.values()) == {shown}


def test_an_epoch_has_whole_steps_and_one_at_least() -> None:
    assert [steps_per_epoch(images, 16) for images in (1, 10, 16, 31, 32, 100)] == [1, 1, 1, 1, 2, 6]


# Unreadable files


def test_an_unreadable_image_is_replaced_by_the_next_of_its_class(config: Finetune) -> None:
    damage(Path(config.data), "train/a/004.png", "train/a/005.png", "train/b/003.png")
    data = images_of(plain(config))
    for index, instead, bad in ((4, 0, 2), (5, 0, 1), (9, 6, 1)):
        image, label, found = data[0, index]
        assert torch.equal(image, data[0, instead][0]) and label == data[0, instead][1]
        assert len(found) == bad and found[0].path.endswith(data.source.names[index])
        assert "UnidentifiedImageError" in found[0].reason


def test_of_an_unreadable_class_the_next_of_another_is_taken(config: Finetune) -> None:
    damage(Path(config.data), *(f"train/b/00{i}.png" for i in range(4)))
    data = images_of(plain(config))
    image, label, found = data[0, 7]
    assert torch.equal(image, data[0, 0][0]) and label == 0
    assert [Path(bad.path).name for bad in found] == ["001.png", "002.png", "003.png", "000.png"]


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_readable_images_is_an_error(config: Finetune, workers: int) -> None:
    damage(Path(config.data), *choose_labels(config.data).train)
    with pytest.raises(UserError, match=r"^none of the 10 image files can be read; the first: .*png \(Unident"):
        feed(resolved(config.data, workers=workers))


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_feed_goes_on_where_files_are_unreadable(config: Finetune, workers: int) -> None:
    damage(Path(config.data), "train/a/000.png", "train/b/001.png")
    batches = feed(resolved(config.data, workers=workers))
    assert {Path(bad.path).name for *_, bads in batches for bad in bads} == {"000.png", "001.png"}
    assert all(images.shape == (4, 3, 24, 24) for images, *_ in batches)


# Evaluation


@forks
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_validation_is_the_centres_in_the_order_of_the_files(config: Finetune, workers: int, channels: int) -> None:
    config = resolved(config.data, workers=workers, channels=channels, batch_size=3)
    damage(Path(config.data), "val/a/002.png", *(f"val/b/00{i}.png" for i in range(3)))
    labels, transform = choose_labels(config.data), eval_transform(config)
    bad: list[Bad] = []
    batches = list(val_batches(config, labels, transform, bad.extend))
    assert [places for *_, places in batches] == [[0, 1], [6]]  # of three batches the middle one is empty
    assert [y.tolist() for _, y, _ in batches] == [[0, 0], [1]]
    assert [bad.path for bad in bad] == [str(Path(labels.root, labels.val[i])) for i in (2, 3, 4, 5)]
    for images, _, places in batches:
        want = [transform(read_image(Path(labels.root, labels.val[place]), channels)) for place in places]
        assert images.dtype == torch.uint8 and torch.equal(images, torch.stack(want))
    seen = Normalise(*IMAGENET[channels], CPU)(batches[0][0])
    assert seen.shape == (2, channels, 24, 24)


def test_nothing_readable_to_validate_with_is_an_error(config: Finetune) -> None:
    labels = choose_labels(config.data)
    damage(Path(config.data), *labels.val)
    bad: list[Bad] = []
    with pytest.raises(UserError, match="none of the 7 image files can be read"):
        list(val_batches(config, labels, eval_transform(config), bad.extend))
    assert len(bad) == 7


# Class weights


def of_counts(*counts: int) -> Labels:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return Labels("", [str(label) for label in range(len(counts))], [""] * len(labels), [], labels, [], [])


def test_balanced_weights_are_those_of_scikit_learn_and_average_one() -> None:
    labels = of_counts(50, 5, 1)
    weights = class_weights(labels, "balanced")
    y = np.array(labels.train_labels)
    want = compute_class_weight("balanced", classes=np.arange(3), y=y)
    assert weights is not None
    np.testing.assert_allclose(weights.numpy(), want, rtol=1e-6)
    assert weights[labels.train_labels].mean().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("counts", "mode", "weighted"),
    [
        ((30, 10), "auto", False), ((31, 10), "auto", True), ((31, 10), "none", False), ((10, 10), "balanced", True),
        ((10, 10), "auto", False), ((1, 1, 4), "auto", True),
    ],
)  # fmt: skip
def test_classes_are_weighted_where_they_are_unbalanced(counts: tuple[int, ...], mode: str, weighted: bool) -> None:
    assert (class_weights(of_counts(*counts), mode) is not None) is weighted


def test_soft_targets_are_weighted_class_by_class() -> None:
    weights = class_weights(of_counts(50, 5, 1), "auto")
    assert weights is not None
    _, targets = mix(mixing(resolved("-"), 3), noisy(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), seed=0)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    losses = [
        -sum(weights[k] * targets[i, k] * (logits[i, k] - logits[i].exp().sum().log()) for k in range(3))
        for i in range(4)
    ]
    torch.testing.assert_close(cross_entropy(logits, targets, weight=weights), torch.stack(losses).mean())
