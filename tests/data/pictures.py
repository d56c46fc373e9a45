"""Pictures and sources to test the data feed with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leanmim.data import Crops, read_image

CPU = torch.device("cpu")


# Python 3.12 warns of every fork of a process that has threads
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks(height: int = 48, width: int = 80) -> np.ndarray:
    """16 px squares of one colour each: no symmetry, and nothing for a codec to lose."""
    return noise(height // 16, width // 16, 7).repeat(16, 0).repeat(16, 1)


def grey(rgb: np.ndarray) -> np.ndarray:
    """Luma of ITU-R 601."""
    return rgb @ np.array([0.299, 0.587, 0.114])


def write(path: Path, height: int = 40, width: int = 56, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, seed)).save(path)
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pixels(path: Path, channels: int = 3) -> np.ndarray:
    image = read_image(path, channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    return np.asarray(image).astype(int)


class Files:
    """The source of so many files."""

    def __init__(self, files: list[Path], channels: int = 3) -> None:
        self.files, self.channels = files, channels
        self.names = [file.name for file in files]

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> Image.Image:
        return read_image(self.files[index], self.channels)


def crops(files: list[Path], size: tuple[int, int] = (24, 24), channels: int = 3, seed: int = 0) -> Crops:
    return Crops(Files(files, channels), size, (0.2, 1.0), (0.75, 4 / 3), 0.5, seed)


def tree(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write(root / name, 12, 12, seed=i)
    return root
