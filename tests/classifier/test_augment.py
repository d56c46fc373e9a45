"""The augmentations are timm's, each a function of its seed."""

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import random_seed
from torch import Tensor
from torch.nn.functional import cross_entropy

from leanmim.classifier.augment import eval_transform, mix, mixing, seeded, train_transform
from leanmim.data import IMAGENET, centre_crop
from leanmim.errors import UserError
from tests.classifier.folders import photo, resolved
from tests.data.stored import values
from tests.helpers import noisy

MEAN, STD = IMAGENET[3]


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_a_seeded_block_draws_what_its_seed_says_and_leaves_no_trace() -> None:
    random_seed(7)
    expected = draws()
    random_seed(3)
    first, rest = draws(), draws()
    random_seed(3)
    assert draws() == first
    with seeded(7):
        assert draws() == expected
        with seeded(8):
            assert draws() != expected
    with pytest.raises(ZeroDivisionError), seeded(2**63 - 1):
        draws()
        raise ZeroDivisionError
    assert draws() == rest


def test_seeding_leaves_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def reseeded(seed: int) -> None:
        raise AssertionError("drop path on the GPU would repeat")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    with seeded(0):
        pass


@pytest.mark.parametrize(
    ("size", "changes", "arguments"),
    [
        ((24,), {}, {}),
        ((24, 40), {}, {}),
        ((40, 24), {"crop_scale": (0.5, 0.9), "flip": 0.0}, {"scale": (0.5, 0.9), "hflip": 0.0}),
        ((32,), {"randaugment": "none"}, {"auto_augment": None}),
        ((32,), {"erase": 0.0, "flip": 1.0}, {"re_prob": 0.0, "hflip": 1.0}),
        ((32,), {"randaugment": "augmix-m3-w2", "erase": 1.0}, {"auto_augment": "augmix-m3-w2", "re_prob": 1.0}),
    ],
)
def test_the_transform_is_timms(size: tuple[int, ...], changes: dict[str, Any], arguments: dict[str, Any]) -> None:
    ours = train_transform(resolved("-", input_size=size, **changes), MEAN, STD)
    own: dict[str, Any] = dict(
        is_training=True, scale=(0.08, 1.0), color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic", re_prob=0.25, re_mode="pixel", mean=MEAN, std=STD,
    )  # fmt: skip
    theirs = create_transform((3, size[0], size[-1]), **{**own, **arguments})
    seen = set()
    for seed in range(20):
        with seeded(seed):
            got = ours(photo(seed % 3))
        random_seed(seed)
        assert torch.equal(got, theirs(photo(seed % 3)))
        assert got.shape == (3, size[0], size[-1]) and got.dtype == torch.float32
        seen.add(got.numpy().tobytes())
    assert len(seen) == 20


def test_of_one_channel_the_colours_are_augmented_then_turned_grey() -> None:
    config = resolved("-", channels=1, erase=0.0)
    ours = train_transform(config, (0.4,), (0.2,))
    coloured = create_transform(
        24, is_training=True, color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        mean=(0.4,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    for seed in range(20):
        with seeded(seed):
            got = ours(photo(seed))
        with seeded(seed):
            pixels = ((coloured(photo(seed)) + 0.4) * 255).round().byte().permute(1, 2, 0).numpy()
        grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)
        assert got.shape == (1, 24, 24)
        np.testing.assert_allclose(got[0].numpy(), (grey / 255 - 0.4) / 0.2, atol=1e-5)
    erased = train_transform(resolved("-", channels=1, erase=1.0, randaugment="none"), (0.4,), (0.2,))
    with seeded(0):
        assert erased(Image.new("RGB", (24, 24))).unique().numel() > 10


def test_with_everything_off_the_picture_is_resized_and_normalised() -> None:
    config = resolved("-", randaugment="none", erase=0.0, flip=0.0, crop_scale=(1.0, 1.0))
    image = photo(height=24, width=24)
    want = (np.asarray(image) / 255 - MEAN) / STD
    with seeded(3):
        got = train_transform(config, MEAN, STD)(image)
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), want, atol=1e-5)


def test_a_transform_can_be_sent_to_a_process() -> None:
    transform = train_transform(resolved("-", channels=1), (0.4,), (0.2,))
    sent = pickle.loads(pickle.dumps(transform))
    with seeded(5):
        got = transform(photo())
    with seeded(5):
        assert torch.equal(sent(photo()), got)


@pytest.mark.parametrize("text", ["rand-x9", "rand-m9.5", "rand-m9-nine9", "loud"])
def test_an_unknown_augmentation_is_an_error_with_a_remedy(text: str) -> None:
    with pytest.raises(UserError, match=f"--randaugment {text!r} is no string of timm's; give one as rand-m9"):
        train_transform(resolved("-", randaugment=text), MEAN, STD)


@pytest.mark.parametrize(("size", "crop"), [((24, 32), None), ((160,), None), ((24,), 0.8)])
def test_evaluation_sees_the_centre(photos: Path, size: tuple[int, ...], crop: float | None) -> None:
    with Image.open(photos / "bee.jpg") as image:
        got = eval_transform(resolved("-", input_size=size, crop=crop))(image)
        assert torch.equal(got, centre_crop((size[0], size[-1]), crop)(image))


# Mixup


def batch(count: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    return noisy(count, 3, 12, 20), torch.arange(count) % classes


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing_is_timms(count: int, mixup: float, cutmix: float) -> None:
    own = mixing(resolved("-", mixup=mixup, cutmix=cutmix, smoothing=0.1, mixup_switch=0.4), 5)
    theirs = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, switch_prob=0.4, label_smoothing=0.1, num_classes=5)
    mixed = 0
    for seed in range(20):
        images, targets = mix(own, *batch(count), seed)
        random_seed(seed)
        want_images, want_targets = theirs(*batch(count))
        assert torch.equal(images, want_images) and torch.equal(targets, want_targets)
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        mixed += not torch.equal(images, batch(count)[0])
    assert mixed > 10  # a share, or a box, can be next to nothing


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_last_image_of_an_odd_batch_is_not_mixed(count: int) -> None:
    own = mixing(resolved("-"), 5)
    images, labels = batch(count)
    mixed, targets = mix(own, images.clone(), labels, seed=2)
    even, soft = mix(own, images[:-1].clone(), labels[:-1], seed=2)
    assert torch.equal(mixed[:-1], even) and torch.equal(targets[:-1], soft)
    assert torch.equal(mixed[-1], images[-1])
    assert targets[-1].tolist() == pytest.approx([0.92 if k == labels[-1] else 0.02 for k in range(5)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_the_loss_is_that_of_smoothed_labels(smoothing: float) -> None:
    own = mixing(resolved("-", mixup=0.0, cutmix=0.0, smoothing=smoothing), 5)
    images, labels = batch(7)
    mixed, targets = mix(own, images.clone(), labels, seed=0)
    assert torch.equal(mixed, images)
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    want = LabelSmoothingCrossEntropy(smoothing)(logits, labels)
    torch.testing.assert_close(SoftTargetCrossEntropy()(logits, targets), want)
    torch.testing.assert_close(cross_entropy(logits, targets), want)


def test_mixing_depends_on_its_seed_and_leaves_the_random_numbers_alone() -> None:
    own = mixing(resolved("-"), 5)
    random_seed(1)
    expected = draws()
    random_seed(1)
    results = [mix(own, *batch(4), seed) for seed in (0, 1, 0)]
    assert draws() == expected
    assert torch.equal(results[0][0], results[2][0]) and torch.equal(results[0][1], results[2][1])
    assert not torch.equal(results[0][0], results[1][0])


def test_full_magnitude_is_drawn_without_an_error() -> None:
    """timm's posterisation asks for no bit then, which the newest Pillow refuses."""
    config = resolved("-", randaugment="rand-m10-mstd0-inc1-n8")
    transform = train_transform(config, [0.5] * 3, [0.25] * 3)
    image = Image.effect_noise((40, 40), 60).convert("RGB")
    for seed in range(20):
        with seeded(seed):
            assert transform(image).isfinite().all()


def test_stored_values_are_cropped_flipped_and_normalised() -> None:
    """With the whole image as its crop nothing else happens to them."""
    array = values(5, 24, 24).transpose(1, 2, 0)
    mean, std = (3e4, 3.1e4, 3.2e4, 3.3e4, 3.4e4), (1e4, 2e4, 3e4, 4e4, 5e4)
    config = resolved("-", channels=5, randaugment="none", erase=0.0, crop_scale=(1.0, 1.0))
    transform = pickle.loads(pickle.dumps(train_transform(config, mean, std)))
    want = torch.from_numpy(((array - np.array(mean)) / np.array(std)).astype(np.float32)).permute(2, 0, 1)
    flipped = set()
    for seed in range(10):
        with seeded(seed):
            got = transform(array)
        flipped.add(torch.allclose(got, want.flip(2), atol=1e-5))
        assert torch.allclose(got, want, atol=1e-5) != torch.allclose(got, want.flip(2), atol=1e-5)
    assert flipped == {True, False}


def test_crops_and_erasing_of_stored_values_follow_the_seed() -> None:
    array = values(5, 40, 50).transpose(1, 2, 0)
    transform = train_transform(resolved("-", channels=5, randaugment="none", erase=1.0), (3e4,) * 5, (1e4,) * 5)
    seen = []
    for seed in (0, 1, 0):
        with seeded(seed):
            seen.append(transform(array))
    assert seen[0].shape == (5, 24, 24)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    with pytest.raises(UserError, match="is for 8-bit images; give none"):
        train_transform(resolved("-", channels=5), (3e4,) * 5, (1e4,) * 5)
