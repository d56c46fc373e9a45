"""Labelled folders and configurations for the data of fine-tuning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from leanmim.config.finetune import Finetune
from tests.data.pictures import noise, touch


def resolved(root: Path | str, **changes: Any) -> Finetune:
    """A configuration without auto, at 24 px."""
    config = Finetune(
        start="scratch", data=str(root), out="-", input_size=(24,), channels=3, epochs=2, batch_size=4, workers=0,
        mixup=0.8, cutmix=1.0, smoothing=0.1, randaugment="rand-m9-mstd0.5-inc1", erase=0.25, crop_scale=(0.08, 1.0),
    )  # fmt: skip
    return replace(config, **changes)


def names(root: Path, **counts: int) -> Path:
    """So many empty image files of each class below a folder."""
    touch(root, *(f"{name}/{i:03}.png" for name, count in counts.items() for i in range(count)))
    return root


def photos(root: Path, height: int = 24, width: int = 24, **counts: int) -> Path:
    """So many pictures of each class below a folder, of another noise each."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(height, width, seed)).save(root / name / f"{i:03}.png")
            seed += 1
    return root


def photo(seed: int = 0, height: int = 40, width: int = 56) -> Image.Image:
    """Smooth colours, so that a resize changes little, with noise on them."""
    coarse = Image.fromarray(noise(4, 5, seed)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(coarse) // 2 + noise(height, width, seed) // 4).astype(np.uint8))
