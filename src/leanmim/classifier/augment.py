"""The augmentations of fine-tuning: timm's own parts, each under a seed of its own.

b batch, c channels, H W pixels, k classes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from leanmim.config.base import Stored, as_read
from leanmim.config.finetune import Finetune
from leanmim.data import centre_crop
from leanmim.data.crops import random_box, resized
from leanmim.data.read import cut_whole
from leanmim.errors import UserError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU), which timm draws from; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)  # torch's also reseeds the GPU
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def train_transform(config: Finetune, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """From an RGB picture to a normalised tensor, by timm's transform for training: crop, flip, RandAugment, erasing.

    A model of one channel sees the same augmentations, turned to grey before normalisation. Stored values are cropped, flipped and
    erased alike, without RandAugment, which is for colours of 8 bits.

    Args:
        config: input size, channels and augmentations, all of them resolved.
        mean: of each channel.
        std: of each channel.

    Raises:
        UserError: timm does not know --randaugment, or the images are stored values.
    """
    assert isinstance(config.crop_scale, tuple)
    if isinstance(as_read(config.channels or 3, config.values), Stored):
        if config.randaugment != "none":
            raise UserError(f"--randaugment {config.randaugment!r} is for 8-bit images; give none for stored values")
        return v2.Compose(
            [
                partial(random_crop, size=image_size(config), scale=config.crop_scale),
                v2.RandomHorizontalFlip(config.flip),
                v2.Normalize(list(mean), list(std)),
                RandomErasing(float(config.erase), mode="pixel", device="cpu"),
            ]
        )
    create = partial(
        create_transform,
        image_size(config),
        is_training=True,
        scale=config.crop_scale,
        hflip=config.flip,
        color_jitter=None,  # type: ignore[arg-type]  # 0 would still draw
        auto_augment=None if config.randaugment == "none" else config.randaugment,
        interpolation="bicubic",
        re_prob=float(config.erase),
        re_mode="pixel",
        separate=True,
    )
    try:
        # RandAugment fills what it uncovers with the mean, in colour.
        crop, augment, _ = create(mean=tuple(mean) * (3 // len(mean)), std=tuple(std) * (3 // len(std)))
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"--randaugment {config.randaugment!r} is no string of timm's; give one as rand-m9-mstd0.5-inc1, or none"
        ) from error
    for op in (op for part in augment.transforms for op in getattr(part, "ops", ())):
        if op.name.startswith("Posterize"):
            op.level_fn = partial(one_bit_at_least, op.level_fn)
    _, _, normalise = create(mean=tuple(mean), std=tuple(std))
    grey = [v2.Grayscale()] if config.channels == 1 else []
    return v2.Compose([crop, augment, *grey, normalise])


def random_crop(values: Real[np.ndarray, "h w c"], size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    """A RandomResizedCrop of stored values, drawn by Python's global generator."""
    choose = partial(random_box, scale=scale, ratio=(3 / 4, 4 / 3), draw=random.Random(random.getrandbits(64)))
    return resized(cut_whole(values, choose), size, "bicubic")


def one_bit_at_least(level_fn: Callable, level: int | float, hparams: dict[str, Any]) -> tuple[int]:
    """Bits that timm's posterisation keeps. At full magnitude it asks for none, which newer versions of Pillow refuse."""
    return (max(1, *level_fn(level, hparams)),)


def eval_transform(config: Finetune) -> Callable:
    """From a picture of the model's channels to its centre, as `leanmim.data.centre_crop`; normalisation happens on the device."""
    return centre_crop(image_size(config), config.crop)


def image_size(config: Finetune) -> tuple[int, int]:
    """Resolved input height and width, px."""
    return config.input_size[0], config.input_size[-1]


def mixing(config: Finetune, classes: int) -> Mixup:
    """timm's Mixup and CutMix, one draw a batch; with neither it only smooths the labels.

    Smoothing is that of timm's LabelSmoothingCrossEntropy: of s, every class gets s / k and the right one the rest.
    """
    alphas = float(config.mixup), float(config.cutmix)
    mixup = Mixup(
        *alphas, switch_prob=config.mixup_switch, label_smoothing=float(config.smoothing), num_classes=classes
    )
    mixup.mixup_enabled = any(alphas)
    return mixup


def mix(
    mixup: Mixup, images: Float[Tensor, "b c H W"], labels: Int[Tensor, "b"], seed: int
) -> tuple[Float[Tensor, "b c H W"], Float[Tensor, "b k"]]:
    """The batch mixed in place, each image with its counterpart from the other end, and its soft targets.

    The last image of an odd batch has no counterpart and stays as it is.
    """
    even = len(images) // 2 * 2
    targets = mixup_target(labels, mixup.num_classes, smoothing=mixup.label_smoothing)
    if even:
        with seeded(seed):
            _, targets[:even] = mixup(images[:even], labels[:even])
    return images, targets
