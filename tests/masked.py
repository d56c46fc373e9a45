"""Folders of images with segmentation masks, drawn from squares of three colours."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], dtype=float)


def masked_squares(
    root: Path, counts: tuple[int, int] = (12, 6), squares: int = 4, side: int = 16, random: bool = False
) -> Path:
    """Images of squares x squares noisy squares; the colour is the class, or the class is random. Each mask has a frame of void,
    255, a pixel wide.
    """
    draw = np.random.default_rng(0)
    for part, count in zip(("train", "val"), counts, strict=True):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for i in range(count):
            colours, classes = draw.integers(0, 3, (2, squares, squares))
            pixels = COLOURS[np.kron(colours, np.ones((side, side), int))]
            noisy = np.clip(pixels + draw.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / part / "images" / f"{i}.png")
            write_mask(root / part / "masks" / f"{i}.png", framed(np.kron(classes if random else colours, ones(side))))
    return root


def ones(side: int) -> np.ndarray:
    return np.ones((side, side), int)


def framed(mask: np.ndarray) -> np.ndarray:
    mask[[0, -1]] = mask[:, [0, -1]] = 255
    return mask


def write_mask(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8)).save(path)
